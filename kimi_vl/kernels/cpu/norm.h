// The root mean square norm of one token, as kimi_vl/kernels/reference.py has it.
#pragma once

#include <cmath>

#include "vectors.h"

namespace {

// `total` (H) = residual + delta, and its norm; without a delta (null) the norm of the residual, and no total.
template <class T>
inline void rms_norm(const T* residual, const T* delta, const T* weight, float eps, int64_t H, T* total, T* normed) {
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < H; i += LANES) {
        __mmask16 mask = first(H - i);
        __m512 sum = load(residual + i, mask);
        if (delta) {
            sum = rounded<T>(_mm512_add_ps(sum, load(delta + i, mask)));
            store(total + i, sum, mask);
        }
        squares = _mm512_fmadd_ps(sum, sum, squares);
    }
    const T* from = delta ? total : residual;
    __m512 scale = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / H + eps));
    for (int64_t i = 0; i < H; i += LANES) {
        __mmask16 mask = first(H - i);
        __m512 own = rounded<T>(_mm512_mul_ps(load(from + i, mask), scale));
        store(normed + i, _mm512_mul_ps(own, load(weight + i, mask)), mask);
    }
}

}  // namespace
