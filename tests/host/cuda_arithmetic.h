// Floating point for kernels that cuda_emulator.h runs on the CPU, as the CUDA math API defines it.
#pragma once

#include <stdint.h>
#include <string.h>

// Not inlined, so that no compiler joins a product and a sum.
#define ROUNDED(name, operation) \
    [[gnu::noinline, maybe_unused]] static float name(float a, float b) { return a operation b; }
ROUNDED(__fadd_rn, +)
ROUNDED(__fsub_rn, -)
ROUNDED(__fmul_rn, *)
ROUNDED(__fdiv_rn, /)
static inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// fp16, of which IEEE 754 says all
struct Half {
    uint16_t bits;
};
static inline Half __ushort_as_half(uint16_t bits) { return {bits}; }
static inline uint16_t __half_as_ushort(Half half) { return half.bits; }
static inline float __half2float(Half half) {
    const uint32_t sign = (uint32_t)(half.bits & 0x8000u) << 16, exponent = half.bits >> 10 & 31u;
    const uint32_t fraction = half.bits & 0x3FFu;
    if (exponent == 0) return __uint_as_float(sign | __float_as_uint((float)fraction * 0x1p-24f));
    return __uint_as_float(sign | (exponent == 31u ? 255u : exponent + 112u) << 23 | fraction << 13);
}
static inline Half __float2half_rn(float value) {
    const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
    const uint32_t exponent = size >> 23;
    if (size > 0x7F800000u) return {(uint16_t)0x7FFFu};  // NaN, as the card has it
    if (exponent >= 143) return {(uint16_t)(sign | 0x7C00u)};
    // a normal number keeps 11 bits of the 24, a smaller one those down to 2^-24
    const uint32_t dropped = exponent >= 113 ? 13 : 126 - exponent;
    if (dropped > 24) return {(uint16_t)sign};
    const uint32_t significand = (size & 0x7FFFFFu) | 0x800000u, half = 1u << (dropped - 1);
    uint32_t kept = significand >> dropped;
    const uint32_t rest = significand & (2 * half - 1);
    kept += rest > half || (rest == half && kept % 2);
    return {(uint16_t)(sign | (exponent >= 113 ? ((exponent - 113) << 10) + kept : kept))};
}
