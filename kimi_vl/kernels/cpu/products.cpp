// Products of weights with vectors: matrices, one matrix for each head, and a layer's experts in one call.
//
// Weights lie in blocks of 16 output channels. A register has one lane for each channel, so no sum crosses lanes, and a
// lane adds in the order of the inputs whatever the tile: a vector's result has the same bits alone and in any batch.
// A block is its channels' bytes as the checkpoint has them, transposed in units of 4 bytes: [inputs / unit][16][4].
//   bfloat16: 2 inputs a unit;  int8: 4, the codes w + 128;  int4: 8, the codes w + 8, even inputs in the low halves.
// Scales are [outputs / 16][groups][16], one group a channel in int8.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

typedef uint8_t u8;

// ---- values

template <class T> inline T read(const u8* from) {
    T value;
    memcpy(&value, from, sizeof(T));
    return value;
}

inline __m512i four_bytes(const u8* from) { return _mm512_set1_epi32(read<int32_t>(from)); }  // in all lanes

// Reading waits where nothing is asked for beforehand: a processor follows few streams by itself.
constexpr int AHEAD = 2048;  // bytes
inline void ask_for(const u8* from) { _mm_prefetch((const char*)from, _MM_HINT_T0); }

float largest(const float* x, int count) {  // magnitude; NaN if there is one, which as an integer is above all numbers
    __m512i most = _mm512_setzero_si512();
    for (int i = 0; i < count; i += 16)
        most = _mm512_max_epi32(most, _mm512_castps_si512(_mm512_abs_ps(_mm512_loadu_ps(x + i))));
    return _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(most))));
}

inline __m512 inverse(float scale) { return _mm512_set1_ps(scale > 1e-30f ? 1 / scale : 0); }  // never infinite
inline __m512i scaled(const float* x, __m512 by) { return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), by)); }

// ---- weights

struct Block {
    const u8 *values, *scales;
};

struct Matrix {  // as kimi_vl/kernels/cpu/products.py has it: some matrices of the same shape, one after another
    const u8 *values, *scales;
    int32_t outputs, inputs, bits, group, kind;  // of scales: 0 bfloat16, 1 float16, 2 float32

    Block block(size_t number) const {
        const size_t of_scales = scales ? size_t(inputs / group) * (kind == 2 ? 64 : 32) : 0;  // bytes
        return {values + number * inputs * 2 * bits, scales + number * of_scales};
    }
    Matrix from(size_t number) const {  // the same without the blocks before this one
        const Block first = block(number);
        return {first.values, first.scales, outputs, inputs, bits, group, kind};
    }
    __m512 scales_of(const Block& block, int group) const {  // those of 16 channels
        if (kind == 0) return load((const bfloat16*)block.scales + 16 * group);
        if (kind == 1) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)block.scales + group));
        return _mm512_loadu_ps((const float*)block.scales + 16 * group);
    }
};

// ---- formats: how a vector is prepared, and a tile of R blocks and M vectors, whose sums are in registers.

struct Bf16 {
    static constexpr int most = 12;  // vectors of a tile
    static constexpr bool by_value = true;  // values of a vector are prepared one by one
    static constexpr int blocks(int M) { return M == 1 ? 8 : M <= 6 ? 4 : 2; }  // of a tile

#ifdef __AVX512BF16__
    static constexpr int value = 2;
#else
    static constexpr int value = 4;
#endif
    static size_t vector(int inputs) { return size_t(inputs) * value; }
    static void put(u8* vector, int i, __m512 x) {
        if (value == 2) store((bfloat16*)vector + i, x);
        else _mm512_storeu_ps((float*)vector + i, x);
    }
    static void prepare(const float* x, u8* vector, int inputs) {
        for (int i = 0; i < inputs; i += 16) put(vector, i, _mm512_loadu_ps(x + i));
    }

    // Two inputs of each block and vector. Without an instruction for bfloat16 their float32 values are multiplied.
    template <int R, int M>
    static inline void add(__m512 (&sums)[R][M], const Block* w, const u8* const* x, int j) {
#ifdef __AVX512BF16__
        __m512bh v[R];
        UNROLL for (int r = 0; r < R; r++) v[r] = (__m512bh)_mm512_loadu_si512(w[r].values + size_t(j) * 64);
        UNROLL for (int m = 0; m < M; m++) {
            __m512bh both = (__m512bh)four_bytes(x[m] + size_t(j) * 4);
            UNROLL for (int r = 0; r < R; r++) sums[r][m] = _mm512_dpbf16_ps(sums[r][m], v[r], both);
        }
#else
        UNROLL for (int half = 0; half < 2; half++) {
            __m512 v[R];
            UNROLL for (int r = 0; r < R; r++) {
                __m512i both = _mm512_loadu_si512(w[r].values + size_t(j) * 64);
                both = half ? _mm512_and_si512(both, _mm512_set1_epi32(0xffff0000)) : _mm512_slli_epi32(both, 16);
                v[r] = _mm512_castsi512_ps(both);
            }
            UNROLL for (int m = 0; m < M; m++) {
                __m512 one = _mm512_set1_ps(((const float*)x[m])[2 * j + half]);
                UNROLL for (int r = 0; r < R; r++) sums[r][m] = _mm512_fmadd_ps(v[r], one, sums[r][m]);
            }
        }
#endif
    }
    template <int R, int M>
    static void tile(__m512 (&sums)[R][M], const Block* w, const u8* const* x, const Matrix& matrix) {
        for (int j = 0; j < matrix.inputs / 2; j++) {
            UNROLL for (int r = 0; r < R; r++) ask_for(w[r].values + size_t(j) * 64 + AHEAD);
            add<R, M>(sums, w, x, j);
        }
    }
};

// sum += the products of 4 unsigned and 4 signed bytes in each lane. (gcc 12 copies each sum for the intrinsic.)
inline void dot(__m512i& sum, __m512i w, __m512i x) { asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x)); }

struct Int8 {  // vectors of 16 bits with one scale, in two parts: 256 high + low
    static constexpr int most = 6;
    static constexpr bool by_value = false;
    static constexpr int blocks(int M) { return M == 1 ? 8 : M <= 3 ? 4 : 2; }
    static size_t vector(int inputs) { return 2 * size_t(inputs) + 64; }  // then the scale, and where sums begin

    static void prepare(const float* x, u8* vector, int inputs) {
        float scale = largest(x, inputs) / 32512;
        const __m512 by = inverse(scale);
        __m512i sums[2] = {};
        for (int i = 0; i < inputs; i += 16) {
            __m512i whole = scaled(x + i, by);
            __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
            __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 8));
            sums[0] = _mm512_add_epi32(sums[0], high);
            sums[1] = _mm512_add_epi32(sums[1], low);
            _mm_storeu_si128((__m128i*)(vector + i), _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128((__m128i*)(vector + inputs + i), _mm512_cvtepi32_epi8(low));
        }
        // codes are 128 more than the weights
        int32_t begin[2] = {-128 * _mm512_reduce_add_epi32(sums[0]), -128 * _mm512_reduce_add_epi32(sums[1])};
        memcpy(vector + 2 * inputs, &scale, 4);
        memcpy(vector + 2 * inputs + 4, begin, 8);
    }
    template <int R, int M>
    static void tile(__m512 (&y)[R][M], const Block* w, const u8* const* x, const Matrix& matrix) {
        const size_t inputs = matrix.inputs;
        __m512i high[R][M], low[R][M];
        UNROLL for (int m = 0; m < M; m++) UNROLL for (int r = 0; r < R; r++) {
            high[r][m] = four_bytes(x[m] + 2 * inputs + 4);
            low[r][m] = four_bytes(x[m] + 2 * inputs + 8);
        }
        for (size_t i = 0; i < inputs; i += 4) {
            __m512i v[R];
            UNROLL for (int r = 0; r < R; r++) {
                ask_for(w[r].values + i * 16 + AHEAD);
                v[r] = _mm512_loadu_si512(w[r].values + i * 16);
            }
            UNROLL for (int m = 0; m < M; m++) {
                __m512i above = four_bytes(x[m] + i), below = four_bytes(x[m] + inputs + i);
                UNROLL for (int r = 0; r < R; r++) dot(high[r][m], v[r], above), dot(low[r][m], v[r], below);
            }
        }
        UNROLL for (int r = 0; r < R; r++) {
            __m512 scales = matrix.scales_of(w[r], 0);
            UNROLL for (int m = 0; m < M; m++) {
                __m512 above = _mm512_cvtepi32_ps(high[r][m]), below = _mm512_cvtepi32_ps(low[r][m]);
                __m512 sum = _mm512_fmadd_ps(above, _mm512_set1_ps(256), below);
                y[r][m] = _mm512_mul_ps(sum, _mm512_mul_ps(scales, _mm512_set1_ps(read<float>(x[m] + 2 * inputs))));
            }
        }
    }
};

struct Int4 {  // vectors of 8 bits with a scale for 32 values
    static constexpr int most = 12;
    static constexpr bool by_value = false;
    static constexpr int blocks(int M) { return M <= 2 ? 4 : M <= 4 ? 2 : 1; }
    static size_t vector(int inputs) { return size_t(inputs) / 4 * 5 + 64; }  // then, for each group, scale and begin

    static void prepare(const float* x, u8* vector, int inputs) {
        const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);  // of halves
        for (int i = 0; i < inputs; i += 32) {
            float scale = largest(x + i, 32) / 127;
            const __m512 by = inverse(scale);
            __m512i sum = _mm512_setzero_si512();
            for (int k = i; k < i + 32; k += 16) {
                __m512i whole = scaled(x + k, by);
                sum = _mm512_add_epi32(sum, whole);
                _mm_storeu_si128((__m128i*)(vector + k), _mm_shuffle_epi8(_mm512_cvtsepi32_epi8(whole), order));
            }
            int32_t begin = -8 * _mm512_reduce_add_epi32(sum);  // codes are 8 more than the weights
            memcpy(vector + inputs + i / 4, &scale, 4);
            memcpy(vector + inputs + i / 4 + 4, &begin, 4);
        }
    }
    template <int R, int M>
    static void tile(__m512 (&y)[R][M], const Block* w, const u8* const* x, const Matrix& matrix) {
        const __m512i half = _mm512_set1_epi8(15);
        const int inputs = matrix.inputs;
        __m512 sums[R][M] = {};  // in registers, as `y` is not before the loop has ended
        int group = -1;
        for (int i = 0, end = 0; i < inputs; i += 32) {
            if (i == end) {
                group++;
                end += matrix.group;
            }
            UNROLL for (int r = 0; r < R; r++) {
                const u8* from = w[r].values + size_t(i) * 8;
                __m512i v[8];
                UNROLL for (int k = 0; k < 4; k++) {
                    ask_for(from + 64 * k + AHEAD);
                    __m512i codes = _mm512_loadu_si512(from + 64 * k);
                    v[2 * k] = _mm512_and_si512(codes, half);
                    v[2 * k + 1] = _mm512_and_si512(_mm512_srli_epi16(codes, 4), half);
                }
                __m512 scales = matrix.scales_of(w[r], group);
                UNROLL for (int m = 0; m < M; m++) {
                    const u8* own = x[m] + inputs + i / 4;
                    __m512i sum = four_bytes(own + 4), other = _mm512_setzero_si512();
                    UNROLL for (int k = 0; k < 8; k += 2) {
                        dot(sum, v[k], four_bytes(x[m] + i + 4 * k));
                        dot(R > 1 ? sum : other, v[k + 1], four_bytes(x[m] + i + 4 * k + 4));
                    }
                    __m512 value = _mm512_cvtepi32_ps(R > 1 ? sum : _mm512_add_epi32(sum, other));
                    __m512 of_both = _mm512_mul_ps(scales, _mm512_set1_ps(read<float>(own)));
                    sums[r][m] = _mm512_fmadd_ps(value, of_both, sums[r][m]);
                }
            }
        }
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int m = 0; m < M; m++) y[r][m] = sums[r][m];
    }
};

// ---- tiles over blocks and vectors: sink(r, m, values) is given the 16 results of block r and vector m.

template <class F, int M, int R, class Sink>
void over_blocks(const Block* w, int r, int blocks, const u8* const* x, const Matrix& matrix, const Sink& sink) {
    for (; r + R <= blocks; r += R) {
        __m512 y[R][M] = {};
        F::template tile<R, M>(y, w + r, x, matrix);
        for (int k = 0; k < R; k++) for (int m = 0; m < M; m++) sink(r + k, m, y[k][m]);
    }
    if constexpr (R > 1) over_blocks<F, M, 1>(w, r, blocks, x, matrix, sink);  // what is left
}

template <class F, int M = 1, class Sink>
void of_count(int count, const Block* w, int blocks, const u8* const* x, const Matrix& matrix, const Sink& sink) {
    if (count == M) over_blocks<F, M, F::blocks(M)>(w, 0, blocks, x, matrix, sink);
    else if constexpr (M < F::most) of_count<F, M + 1>(count, w, blocks, x, matrix, sink);
}

// For `count` vectors, vector(m) each, in parts as even as possible.
template <class F, class Vector, class Sink>
void product(const Block* w, int blocks, const Matrix& matrix, int count, const Vector& vector, const Sink& sink) {
    for (int parts = (count + F::most - 1) / F::most, m = 0; parts; parts--) {
        int own = (count - m + parts - 1) / parts;
        const u8* x[F::most];
        for (int i = 0; i < own; i++) x[i] = vector(m + i);
        of_count<F>(own, w, blocks, x, matrix, [&](int r, int i, __m512 y) { sink(r, m + i, y); });
        m += own;
    }
}

// ---- operations

template <class F>
void prepare(const bfloat16* x, u8* vector, int inputs) {
    float* wide = memory<float>(inputs);
    for (int i = 0; i < inputs; i += 16) _mm512_store_ps(wide + i, load(x + i));
    F::prepare(wide, vector, inputs);
}

constexpr int CHUNK = 8;  // blocks of a piece
constexpr int SLICE = 96;  // vectors of a piece

// y (n, matrices, O) of x (n, matrices, I): each vector by its own matrix.
template <class F>
void project(const Matrix& w, int matrices, const bfloat16* x, int64_t stride, int64_t of_matrix, int n, bfloat16* y) {
    const size_t size = F::vector(w.inputs);
    const int blocks = w.outputs / 16;
    u8* prepared = memory<u8>(size * n * matrices);
#pragma omp parallel
    {
#pragma omp for
        for (int i = 0; i < n * matrices; i++)
            prepare<F>(x + i / matrices * stride + i % matrices * of_matrix, prepared + i * size, w.inputs);
#pragma omp for schedule(dynamic) collapse(3) nowait
        for (int number = 0; number < matrices; number++)
            for (int first = 0; first < blocks; first += CHUNK)
                for (int begin = 0; begin < n; begin += SLICE) {
                    const int own = std::min(CHUNK, blocks - first);
                    Block block[CHUNK];
                    for (int r = 0; r < own; r++) block[r] = w.block(size_t(number) * blocks + first + r);
                    auto place = [&](int m) { return size_t(begin + m) * matrices + number; };
                    product<F>(
                        block, own, w, std::min(SLICE, n - begin), [&](int m) { return prepared + place(m) * size; },
                        [&](int r, int m, __m512 sums) { store(y + place(m) * w.outputs + (first + r) * 16, sums); });
                }
    }
}

struct Choice {  // of an expert by a token
    int token;
    float weight;
};

struct Expert {
    Matrix gate, up, down;
    std::vector<Choice> tokens;
    size_t values, vectors;  // where its inner values (float32) and, prepared, its inner vectors begin

    int width() const { return down.inputs; }
};

// y (n, H): the weighted sum over the experts of each token, added in their order.
template <class F>
void experts(std::vector<Expert>& all, const bfloat16* x, int n, int hidden, bfloat16* y) {
    constexpr int HALF = CHUNK / 2;
    const size_t size = F::vector(hidden);
    size_t values = 0, vectors = 0;
    int widest = 0;
    std::vector<std::pair<const Expert*, int>> inside;  // an expert's vectors that are prepared as a whole, one by one
    for (Expert& expert : all) {
        widest = std::max(widest, expert.width());
        expert.vectors = vectors;
        vectors += expert.tokens.size() * F::vector(expert.width());
        if (F::by_value) continue;
        expert.values = values;
        values += expert.tokens.size() * expert.width();
        for (size_t m = 0; m < expert.tokens.size(); m++) inside.push_back({&expert, int(m)});
    }
    u8 *prepared = memory<u8>(size * n), *inner = memory<u8, 1>(vectors);
    float* plain = memory<float, 1>(values);
#pragma omp parallel
    {
#pragma omp for
        for (int i = 0; i < n; i++) prepare<F>(x + size_t(i) * hidden, prepared + i * size, hidden);
#pragma omp for schedule(dynamic) collapse(2)
        for (const Expert& expert : all)
            for (int first = 0; first < widest / 16; first += HALF) {
                const int own = std::min(HALF, expert.width() / 16 - first);
                if (own <= 0) continue;
                Block block[CHUNK];
                for (int r = 0; r < own; r++) {
                    block[r] = expert.gate.block(first + r);
                    block[own + r] = expert.up.block(first + r);
                }
                __m512 gates[HALF][F::most];  // of one part's vectors: a part's gates are complete before the rest
                product<F>(
                    block, 2 * own, expert.gate, expert.tokens.size(),
                    [&](int m) { return prepared + expert.tokens[m].token * size; },
                    [&](int r, int m, __m512 sums) {
                        __m512& gate = gates[r % own][m % F::most];
                        if (r < own) {
                            gate = sums;
                            return;
                        }
                        __m512 value = _mm512_mul_ps(gated(gate, gate), sums);
                        const int i = (first + r - own) * 16;
                        if constexpr (F::by_value)
                            F::put(inner + expert.vectors + m * F::vector(expert.width()), i, value);
                        else
                            _mm512_storeu_ps(plain + expert.values + size_t(m) * expert.width() + i, value);
                    });
            }
#pragma omp for
        for (size_t i = 0; i < inside.size(); i++) {
            const auto& [expert, m] = inside[i];
            F::prepare(plain + expert->values + size_t(m) * expert->width(),
                       inner + expert->vectors + m * F::vector(expert->width()), expert->width());
        }
        float* sums = memory<float, 2>(size_t(n) * CHUNK * 16);  // (n, 16 CHUNK)
#pragma omp for schedule(dynamic) nowait
        for (int first = 0; first < hidden / 16; first += CHUNK) {
            const int own = std::min(CHUNK, hidden / 16 - first);
            memset(sums, 0, size_t(n) * CHUNK * 64);
            for (const Expert& expert : all) {
                Block block[CHUNK];
                for (int r = 0; r < own; r++) block[r] = expert.down.block(first + r);
                product<F>(
                    block, own, expert.down, expert.tokens.size(),
                    [&](int m) { return inner + expert.vectors + m * F::vector(expert.width()); },
                    [&](int r, int m, __m512 values) {
                        const Choice& choice = expert.tokens[m];
                        float* sum = sums + (size_t(choice.token) * CHUNK + r) * 16;
                        store(sum, _mm512_fmadd_ps(values, _mm512_set1_ps(choice.weight), load(sum)));
                    });
            }
            for (int m = 0; m < n; m++)
                for (int r = 0; r < own; r++)
                    store(y + size_t(m) * hidden + (first + r) * 16, _mm512_load_ps(sums + (m * CHUNK + r) * 16));
        }
    }
}

}  // namespace

extern "C" {

// Transposes blocks of 16 rows of `units` units of 4 bytes, in place: [16][units] to [units][16].
void transpose_blocks(uint32_t* values, int64_t blocks, int64_t units) {
#pragma omp parallel for
    for (int64_t block = 0; block < blocks; block++) {
        uint32_t *own = values + block * 16 * units, *copy = memory<uint32_t>(units * 16);
        memcpy(copy, own, units * 64);
        const __m512i rows = _mm512_mullo_epi32(
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(units));
        for (int64_t i = 0; i < units; i++)
            _mm512_storeu_si512(own + i * 16, _mm512_i32gather_epi32(rows, copy + i, 4));
    }
}

void project(const Matrix* w, int matrices, const bfloat16* x, int64_t stride, int64_t of_matrix, int n, bfloat16* y) {
    auto* own = w->bits == 16 ? project<Bf16> : w->bits == 8 ? project<Int8> : project<Int4>;
    own(*w, matrices, x, stride, of_matrix, n, y);
}

// `gate_up` (E, 2I, H), `down` (E, H, I); `shared`, if given, three matrices (W, H), (W, H), (H, W) that come last.
void experts(const Matrix* gate_up, const Matrix* down, const Matrix* const* shared, const bfloat16* x, int n,
             const int32_t* ids, const float* weights, int choices, bfloat16* y) {
    std::vector<Expert> all;
    std::vector<std::vector<Choice>> chosen;
    for (int i = 0; i < n * choices; i++) {
        if (size_t(ids[i]) >= chosen.size()) chosen.resize(ids[i] + 1);
        chosen[ids[i]].push_back({i / choices, weights[i]});
    }
    for (size_t number = 0; number < chosen.size(); number++) {
        if (chosen[number].empty()) continue;
        const Matrix gate = gate_up->from(number * gate_up->outputs / 16), up = gate.from(down->inputs / 16);
        all.push_back({gate, up, down->from(number * down->outputs / 16), std::move(chosen[number]), 0, 0});
    }
    if (shared) {
        std::vector<Choice> tokens(n);
        for (int token = 0; token < n; token++) tokens[token] = {token, 1};
        all.push_back({*shared[0], *shared[1], *shared[2], std::move(tokens), 0, 0});
    }
    auto* own = gate_up->bits == 16 ? experts<Bf16> : gate_up->bits == 8 ? experts<Int8> : experts<Int4>;
    own(all, x, n, down->outputs, y);
}
}
