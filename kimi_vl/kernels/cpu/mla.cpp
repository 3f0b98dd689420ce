// Latent attention of decode steps over the paged KV cache, and what is written to it: kimi_vl/kernels/reference.py.
#include <algorithm>
#include <atomic>
#include <vector>

#include "norm.h"

// Shapes: T tokens, B sequences of one token each, N heads, R rank of the latent, P rotary dims, Q other dims of keys,
// M pages a sequence. A lane is a head: no sum crosses lanes, and softmax of 16 heads is one register's.

constexpr int64_t SMALL = 1 << 14;  // so many values take one thread less time than a second one takes to begin
constexpr int64_t BLOCK = 32;       // cached tokens whose values are float32 at a time
constexpr int64_t TILE = 16;        // of these, scored together
constexpr int64_t VALUES = 128;     // of a cached token, scored at a time
constexpr int64_t PART = 512;       // cached tokens that two parts of a sequence's attention share at most ...
constexpr int64_t PARTS = 8;        // ... as long as there are not more parts than this

static int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// ---- what is written

// Rotate the pairs (2i, 2i+1); the even components become the first half.
template <class T> static void rotate(const T* from, const T* cos, const T* sin, int64_t P, T* to) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    int64_t half = P / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        __m512 low = load(from + 2 * i, first(P - 2 * i));
        __m512 high = load(from + 2 * i + LANES, first(std::max<int64_t>(0, P - 2 * i - LANES)));
        __m512 even = _mm512_permutex2var_ps(low, evens, high), odd = _mm512_permutex2var_ps(low, odds, high);
        __mmask16 mask = first(half - i);
        store(to + i, _mm512_fmsub_ps(even, load(cos + i, mask), _mm512_mul_ps(odd, load(sin + i, mask))), mask);
        const T *own_cos = cos + half + i, *own_sin = sin + half + i;
        store(to + half + i, _mm512_fmadd_ps(odd, load(own_cos, mask), _mm512_mul_ps(even, load(own_sin, mask))), mask);
    }
}

template <class T>
static void mla_prepare(const T* joined, const T* norm_weight, const T* rope, float eps, const int64_t* slots,
                        int64_t tokens, int64_t decoding, int64_t N, int64_t Q, int64_t P, int64_t R, T* kv_cache,
                        T* query, T* rotated) {
    const int64_t width = N * (Q + P) + R + P;
#pragma omp parallel for if (tokens * (N * P + R + P) > SMALL)
    for (int64_t t = 0; t < tokens; t++) {
        const T *own = joined + t * width, *latent = own + N * (Q + P), *cos = rope + t * 2 * P, *sin = cos + P;
        if (slots[t] >= 0) {
            T* entry = kv_cache + slots[t] * (R + P);
            rms_norm<T>(latent, nullptr, norm_weight, eps, R, nullptr, entry);
            rotate(latent + R, cos, sin, P, entry + R);
        }
        for (int64_t h = 0; h < N; h++) {
            T* to = t < decoding ? query + (t * N + h) * (R + P) + R : rotated + ((t - decoding) * N + h) * P;
            rotate(own + h * (Q + P) + Q, cos, sin, P, to);
        }
    }
}

// ---- attention

// Lane j of register i becomes lane i of register j.
static inline void transpose(__m512 (&values)[LANES]) {
    UNROLL for (int step = 1; step < LANES; step *= 2) {
        alignas(64) int32_t low[LANES], high[LANES];  // lanes of two registers; those of the second are from 16 on
        for (int j = 0; j < LANES; j++) {
            low[j] = j & step ? LANES + j - step : j;
            high[j] = j & step ? LANES + j : j + step;
        }
        __m512i lows = _mm512_load_si512(low), highs = _mm512_load_si512(high);
        UNROLL for (int i = 0; i < LANES; i++) {
            if (i & step) continue;
            __m512 one = values[i], other = values[i + step];
            values[i] = _mm512_permutex2var_ps(one, lows, other);
            values[i + step] = _mm512_permutex2var_ps(one, highs, other);
        }
    }
}

// Into so many parts the attention over `length` cached tokens is cut. It depends on nothing else, so that a sequence's
// result is the same in every batch.
static int64_t parts_of(int64_t length) {
    return length <= BLOCK / 2 ? 1 : std::min(PARTS, 2 * ((length + PART - 1) / PART));
}

// Adds to the scores of TILE cached tokens what `count` of their values contribute.
static inline void score(const float* rows, int64_t width, const float* queries, int64_t count, float* scores) {
    __m512 sums[TILE] = {};
    for (int64_t d = 0; d < count; d++) {
        __m512 query = _mm512_load_ps(queries + d * LANES);
        UNROLL for (int t = 0; t < TILE; t++)
            sums[t] = _mm512_fmadd_ps(query, _mm512_set1_ps(rows[t * width + d]), sums[t]);
    }
    UNROLL for (int t = 0; t < TILE; t++)
        _mm512_store_ps(scores + t * LANES, _mm512_add_ps(_mm512_load_ps(scores + t * LANES), sums[t]));
}

// sums (16, heads) = sums * kept + the first 16 values of `count` rows, weighted.
static inline void mix(const float* rows, int64_t width, const float* weights, int64_t count, __m512 kept,
                       float* sums) {
    __m512 own[LANES];
    UNROLL for (int r = 0; r < LANES; r++) own[r] = _mm512_mul_ps(_mm512_load_ps(sums + r * LANES), kept);
    for (int64_t t = 0; t < count; t++) {
        __m512 weight = _mm512_load_ps(weights + t * LANES);
        _mm_prefetch(rows + t * width + LANES, _MM_HINT_T0);  // of the next call
        UNROLL for (int r = 0; r < LANES; r++)
            own[r] = _mm512_fmadd_ps(weight, _mm512_set1_ps(rows[t * width + r]), own[r]);
    }
    UNROLL for (int r = 0; r < LANES; r++) _mm512_store_ps(sums + r * LANES, own[r]);
}

// Where a softmax is computed from: its greatest score, but 0 where all are -infinity.
static inline __m512 origin(__m512 greatest) {
    __mmask16 none = _mm512_cmp_ps_mask(greatest, _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
    return _mm512_mask_mov_ps(greatest, none, _mm512_setzero_ps());
}

// The attention of up to 16 heads over the cached tokens from `begin` to `end`. `part` is, for each head: the sums of
// latents (R, heads), weighted by e^(score - greatest), then the greatest score and the sum of the weights.
template <class T>
static void attend(const T* query, int64_t heads, const T* kv_cache, const int32_t* pages, int64_t page_size,
                   int64_t begin, int64_t end, int64_t R, int64_t D, float scale, float* part) {
    const int64_t width = up(D, LANES), columns = up(R, LANES);
    float* queries = memory<float>(width * LANES + BLOCK * width + BLOCK * LANES);  // (D, heads)
    float *rows = queries + width * LANES, *weights = rows + BLOCK * width;         // (BLOCK, width), (BLOCK, heads)
    for (int64_t d = 0; d < D; d += LANES) {
        __m512 own[LANES] = {};
        for (int64_t h = 0; h < heads; h++) own[h] = load(query + h * D + d, first(D - d));
        transpose(own);
        for (int j = 0; j < LANES; j++) _mm512_store_ps(queries + (d + j) * LANES, own[j]);
    }
    const auto entry = [=](int64_t at) {
        const uint32_t number = uint32_t(at), size = uint32_t(page_size);  // fast to divide
        return kv_cache + (pages[number / size] * page_size + number % size) * D;
    };
    __m512 greatest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    std::fill(part, part + columns * LANES, 0.f);
    for (int64_t from = begin; from < end; from += BLOCK) {
        const int64_t count = std::min(BLOCK, end - from);
        const T* entries[BLOCK];
        for (int64_t t = 0; t < count; t++) entries[t] = entry(from + t);
        std::fill(weights, weights + BLOCK * LANES, 0.f);
        for (int64_t d = 0; d < width; d += VALUES) {  // as much as the fastest cache holds of rows and queries
            const int64_t own = std::min(VALUES, width - d);
            for (int64_t t = 0; t < up(count, TILE); t++)  // rows that fill up the last tile are 0
                for (int64_t i = d; i < d + own; i += LANES) {
                    __m512 values = t < count ? load(entries[t] + i, first(D - i)) : _mm512_setzero_ps();
                    _mm512_store_ps(rows + t * width + i, values);
                }
            for (int64_t t = 0; t < count; t += TILE)
                score(rows + t * width + d, width, queries + d * LANES, own, weights + t * LANES);
        }
        const __m512 before = greatest;
        for (int64_t t = 0; t < count; t++) {
            __m512 own = _mm512_mul_ps(_mm512_load_ps(weights + t * LANES), _mm512_set1_ps(scale));
            _mm512_store_ps(weights + t * LANES, own);
            greatest = _mm512_max_ps(greatest, own);
        }
        const __m512 kept = exp(_mm512_sub_ps(before, origin(greatest)));
        total = _mm512_mul_ps(total, kept);
        for (int64_t t = 0; t < count; t++) {
            __m512 own = exp(_mm512_sub_ps(_mm512_load_ps(weights + t * LANES), origin(greatest)));
            _mm512_store_ps(weights + t * LANES, own);
            total = _mm512_add_ps(total, own);
        }
        for (int64_t r = 0, at = from + BLOCK; r < columns; r += LANES, at++) {
            for (int64_t i = 0; at < end && i < D; i += 64 / sizeof(T)) _mm_prefetch(entry(at) + i, _MM_HINT_T1);
            mix(rows + r, width, weights, count, kept, part + r * LANES);
        }
    }
    _mm512_store_ps(part + columns * LANES, greatest);
    _mm512_store_ps(part + (columns + 1) * LANES, total);
}

// The parts of a sequence's attention joined: (heads, R).
template <class T> static void join(const float* part, int64_t parts, int64_t heads, int64_t R, T* mixed) {
    const int64_t columns = up(R, LANES), size = (columns + 2) * LANES;
    __m512 greatest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps(), shares[PARTS];
    for (int64_t i = 0; i < parts; i++)
        greatest = _mm512_max_ps(greatest, _mm512_load_ps(part + i * size + columns * LANES));
    for (int64_t i = 0; i < parts; i++) {
        const float* own = part + i * size + columns * LANES;
        shares[i] = exp(_mm512_sub_ps(_mm512_load_ps(own), origin(greatest)));
        total = _mm512_fmadd_ps(shares[i], _mm512_load_ps(own + LANES), total);
    }
    for (int64_t i = 0; i < parts; i++) shares[i] = _mm512_div_ps(shares[i], total);
    for (int64_t r = 0; r < R; r += LANES) {
        __m512 sums[LANES] = {};
        for (int64_t i = 0; i < parts; i++)
            UNROLL for (int j = 0; j < LANES; j++)
                sums[j] = _mm512_fmadd_ps(shares[i], _mm512_load_ps(part + i * size + (r + j) * LANES), sums[j]);
        transpose(sums);
        for (int64_t h = 0; h < heads; h++) store(mixed + h * R + r, sums[h], first(R - r));
    }
}

// The attention of up to 16 heads of a sequence, from `head` on, and its parts among those of the call.
struct Group {
    int64_t sequence, head, first, parts;
};

template <class T>
static void mla_decode(const T* query, const T* kv_cache, const int32_t* page_table, const int32_t* seq_lens, int64_t B,
                       int64_t N, int64_t R, int64_t P, int64_t M, int64_t page_size, float scale, T* mixed) {
    const int64_t size = (up(R, LANES) + 2) * LANES, D = R + P;
    std::vector<Group> groups;
    std::vector<int64_t> group_of;  // each part
    int64_t cached = 0;
    for (int64_t b = 0; b < B; b++) {
        const int64_t length = seq_lens[b];
        cached += length;
        if (length <= 0) {
            std::fill(mixed + b * N * R, mixed + (b + 1) * N * R, T{});
            continue;
        }
        for (int64_t head = 0; head < N; head += LANES) {
            groups.push_back({b, head, int64_t(group_of.size()), parts_of(length)});
            group_of.resize(group_of.size() + parts_of(length), groups.size() - 1);
        }
    }
    float* parts = memory<float, 1>(group_of.size() * size);
    std::vector<std::atomic<int64_t>> done(groups.size());
#pragma omp parallel for schedule(dynamic) if (cached * D > SMALL)
    for (size_t number = 0; number < group_of.size(); number++) {
        const Group& group = groups[group_of[number]];
        const int64_t length = seq_lens[group.sequence], part = number - group.first;
        const int64_t heads = std::min<int64_t>(LANES, N - group.head), place = group.sequence * N + group.head;
        const int64_t begin = length * part / group.parts / TILE * TILE;
        const int64_t end = part + 1 == group.parts ? length : length * (part + 1) / group.parts / TILE * TILE;
        attend(query + place * D, heads, kv_cache, page_table + group.sequence * M, page_size, begin, end, R, D, scale,
               parts + number * size);
        if (done[group_of[number]].fetch_add(1) == group.parts - 1)  // the last one: the others are in memory
            join(parts + group.first * size, group.parts, heads, R, mixed + place * R);
    }
}

EXPORT(mla_prepare)
EXPORT(mla_decode)
