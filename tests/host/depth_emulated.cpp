// kernels/depth.cu on the CPU, one launcher an entry, for tests/test_depth_processing.py.
#include <string.h>

#include "cuda_emulator.h"

// Arithmetic that the other kernels don't use, as the CUDA math API defines it. Not inlined, so that no compiler
// joins a product and a sum.
#define ROUNDED(name, operation) \
    [[gnu::noinline]] static float name(float a, float b) { return a operation b; }
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

namespace depth_cu {
#define EMULATED_KERNEL "../../kernels/depth.cu"
#include "cuda_emulator.h"
}  // namespace depth_cu

extern "C" {

// The order of threads and blocks of the launches that follow.
void reorder(uint32_t seed) { emulator::random_order.seed(seed); }

// half: the entries for fp16; channels: 0 for NCHW; normalisation: scale of red, green, blue, then bias
void run_preprocess(int32_t half, int32_t n, int32_t blocks, const uint8_t* images, int32_t height, int32_t width,
                    int32_t input_height, int32_t input_width, int32_t channels, const float* normalisation,
                    void* inputs) {
    const float* v = normalisation;
    emulator::launch((unsigned)n, (unsigned)blocks, depth_cu::kPreThreads, [=] {
        if (half && !channels)
            depth_cu::depth_preprocess_nchw_half(images, height, width, input_height, input_width, v[0], v[1], v[2],
                                                 v[3], v[4], v[5], (uint16_t*)inputs);
        else if (half)
            depth_cu::depth_preprocess_nhwc_half(images, height, width, input_height, input_width, channels, v[0],
                                                 v[1], v[2], v[3], v[4], v[5], (uint16_t*)inputs);
        else if (!channels)
            depth_cu::depth_preprocess_nchw_float(images, height, width, input_height, input_width, v[0], v[1], v[2],
                                                  v[3], v[4], v[5], (float*)inputs);
        else
            depth_cu::depth_preprocess_nhwc_float(images, height, width, input_height, input_width, channels, v[0],
                                                  v[1], v[2], v[3], v[4], v[5], (float*)inputs);
    });
}

void run_postprocess(int32_t half, int32_t n, const void* predictions, int32_t prediction_height,
                     int32_t prediction_width, int32_t height, int32_t width, int32_t inverse, float scale,
                     uint8_t* grey, float* metres, float* range, int32_t* faults) {
    emulator::launch((unsigned)n, 1, depth_cu::kPostThreads, [=] {
        if (half)
            depth_cu::depth_postprocess_half((const uint16_t*)predictions, prediction_height, prediction_width,
                                             height, width, inverse, scale, grey, metres, range, faults);
        else
            depth_cu::depth_postprocess_float((const float*)predictions, prediction_height, prediction_width, height,
                                              width, inverse, scale, grey, metres, range, faults);
    });
}

// fp16 numbers as they are read, and floats as they are rounded, count of them
void convert(int64_t count, const uint16_t* bits, float* values, const float* floats, uint16_t* rounded) {
    for (int64_t i = 0; i < count; ++i) {
        values[i] = depth_cu::decode(bits[i]);
        depth_cu::encode(floats[i], rounded[i]);
    }
}
}
