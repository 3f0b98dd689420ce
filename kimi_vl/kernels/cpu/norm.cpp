// Norms and the router of a step: what kimi_vl/kernels/reference.py says, for values in bfloat16 or float32.
#include <algorithm>

#include "norm.h"

// Shapes: T tokens of H values, E experts, K experts a token.

constexpr int64_t SMALL = 1 << 15;  // so many values take one thread less time than a second one takes to begin
constexpr int EXPERTS = 8;          // scores of so many experts and of two tokens fit into registers
constexpr int64_t TOKENS = 16;      // of a piece of the router's work

// Scores of M tokens and N experts. Each is summed in the same order, whatever M and N are.
template <int M, int N, class T>
static void scores(const T* states, const T* weight, int64_t H, float* out, int64_t E) {
    __m512 sums[M][N] = {};
    for (int64_t i = 0; i < H; i += LANES) {
        __mmask16 mask = first(H - i);
        __m512 own[N];
        UNROLL for (int n = 0; n < N; n++) own[n] = load(weight + n * H + i, mask);
        UNROLL for (int m = 0; m < M; m++) {
            __m512 state = load(states + m * H + i, mask);
            UNROLL for (int n = 0; n < N; n++) sums[m][n] = _mm512_fmadd_ps(state, own[n], sums[m][n]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) out[m * E + n] = _mm512_reduce_add_ps(sums[m][n]);
}

template <int M, class T>
static void scores(const T* states, const T* weight, int64_t H, float* out, int64_t E, int64_t experts) {
    int64_t n = 0;
    for (; n + EXPERTS <= experts; n += EXPERTS) scores<M, EXPERTS>(states, weight + n * H, H, out + n, E);
    for (; n < experts; n++) scores<M, 1>(states, weight + n * H, H, out + n, E);
}

// The K greatest of biased scores, falling, of equal ones the first. NaN is the greatest, so that ids are always valid.
static void top_k(float* scores, const float* bias, int64_t E, int64_t K, float scaling, int32_t* ids, float* weights) {
    for (int64_t i = 0; i < E; i += LANES) {
        __mmask16 mask = first(E - i);
        store(scores + i, gated(_mm512_set1_ps(1), load(scores + i, mask)), mask);
    }
    auto before = [&](int64_t a, int64_t b) {  // whether expert a is better than b, which has a lower number
        float x = scores[a] + bias[a], y = scores[b] + bias[b];
        return x > y || (x != x && y == y);
    };
    for (int64_t expert = 0, count = 0; expert < E; expert++) {
        int64_t at = count < K ? count++ : K;
        for (; at > 0 && before(expert, ids[at - 1]); at--)
            if (at < K) ids[at] = ids[at - 1];
        if (at < K) ids[at] = int32_t(expert);
    }
    float sum = 0;
    for (int64_t k = 0; k < K; k++) sum += weights[k] = scores[ids[k]];
    for (int64_t k = 0; k < K; k++) weights[k] = weights[k] / (sum + 1e-20f) * scaling;
}

template <class T>
static void add_rms_norm(const T* residual, const T* delta, const T* weight, float eps, int64_t tokens, int64_t H,
                         T* total, T* normed) {
#pragma omp parallel for if (tokens * H > SMALL)
    for (int64_t t = 0; t < tokens; t++)
        rms_norm(residual + t * H, delta ? delta + t * H : nullptr, weight, eps, H, total + t * H, normed + t * H);
}

template <class T>
static void norm_router(const T* residual, const T* delta, const T* norm_weight, float eps, const T* weight,
                        const float* bias, int64_t tokens, int64_t H, int64_t E, int64_t K, float scaling, T* total,
                        T* normed, int32_t* topk_ids, float* topk_weights) {
    float* logits = memory<float>(tokens * E);
#pragma omp parallel if (E * H > SMALL)
    {
#pragma omp for
        for (int64_t t = 0; t < tokens; t++)
            rms_norm(residual + t * H, delta + t * H, norm_weight, eps, H, total + t * H, normed + t * H);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t begin = 0; begin < tokens; begin += TOKENS)
            for (int64_t e = 0; e < E; e += EXPERTS) {
                const int64_t experts = std::min<int64_t>(EXPERTS, E - e), end = std::min(tokens, begin + TOKENS);
                const T* own = weight + e * H;
                int64_t t = begin;
                for (; t + 2 <= end; t += 2) scores<2>(normed + t * H, own, H, logits + t * E + e, E, experts);
                if (t < end) scores<1>(normed + t * H, own, H, logits + t * E + e, E, experts);
            }
#pragma omp for nowait
        for (int64_t t = 0; t < tokens; t++)
            top_k(logits + t * E, bias, E, K, scaling, topk_ids + t * K, topk_weights + t * K);
    }
}

EXPORT(add_rms_norm)
EXPORT(norm_router)
