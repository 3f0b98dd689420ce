// Sixteen float32 lanes from values in bfloat16 or float32, and what all files have in common.
//
// Loops that take long are shared out by schedule(dynamic), so that a thread that is held up elsewhere does not hold up
// the rest. The last loop of a region needs `nowait`: gcc leaves its barrier in, and the region's end is another.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <vector>

// For a loop over registers: none of them can be chosen at run time.
#define UNROLL _Pragma("GCC unroll 24")

// For C, what gives the addresses of a function template's instances: kimi_vl/kernels/cpu/binding.py.
#define EXPORT(name)                                                      \
    extern "C" void* name##_bfloat16() { return (void*)&name<bfloat16>; } \
    extern "C" void* name##_float32() { return (void*)&name<float>; }

// One library is made of several files: what a header defines is each one's own.
namespace {

struct bfloat16 {
    uint16_t bits;
};

constexpr int LANES = 16;
constexpr __mmask16 ALL = 0xffff;

// The first `count` lanes; all of them where `count` is larger.
inline __mmask16 first(int64_t count) { return count >= LANES ? ALL : (1u << count) - 1; }

// Lanes that are masked out are 0, and their memory is not touched.
inline __m512 load(const float* from, __mmask16 mask = ALL) { return _mm512_maskz_loadu_ps(mask, from); }
inline __m512 load(const bfloat16* from, __mmask16 mask = ALL) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
}

// The bits of bfloat16, rounded to the nearest and in a tie to the even one. A NaN stays one: its lower half is 0,
// since it is the processor's own or comes from a bfloat16 value.
inline __m512i rounded_bits(__m512 values) {
    __m512i bits = _mm512_castps_si512(values);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
}

inline void store(float* to, __m512 values, __mmask16 mask = ALL) { _mm512_mask_storeu_ps(to, mask, values); }
inline void store(bfloat16* to, __m512 values, __mmask16 mask = ALL) {
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(rounded_bits(values)));
}

// What `store` followed by `load` gives.
template <class T> inline __m512 rounded(__m512 values) {
    if (sizeof(T) == sizeof(float)) return values;
    return _mm512_castsi512_ps(_mm512_slli_epi32(rounded_bits(values), 16));
}

// e^x within 2 units in the last place; 0 below -126, infinite above 100, and NaN for NaN: where an operand is NaN, min
// and max give the second one.
inline __m512 exp(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(100), _mm512_max_ps(_mm512_set1_ps(-126), x));
    __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693145752f), x);  // ln 2 in two parts
    rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(1.42860677e-6f), rest);
    __m512 sum = _mm512_set1_ps(1.f / 720);
    for (float factor : {1.f / 120, 1.f / 24, 1.f / 6, .5f, 1.f, 1.f})
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(sum, power);
}

// value sigmoid(x)
inline __m512 gated(__m512 value, __m512 x) {
    return _mm512_div_ps(value, _mm512_add_ps(_mm512_set1_ps(1), exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// Memory of the calling thread, in lines of the cache and kept from call to call: fresh pages cost more than what is
// computed in them. Each type and `purpose` has its own.
template <class T, int purpose = 0> inline T* memory(size_t count) {
    static thread_local std::vector<T> kept;
    if (kept.size() < count + 64 / sizeof(T)) kept.resize(count + 64 / sizeof(T));
    return (T*)(((uintptr_t)kept.data() + 63) / 64 * 64);
}

}  // namespace
