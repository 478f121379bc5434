// Pictures as a network's input: bytes to floating point, value * scale + bias a channel, pixel by pixel or plane by
// plane.
//
// Twin: gpufgbg/normalise.py. Judge: plain NumPy in tests/test_normalise.py, which also runs this file on the CPU.
//
// Every bit equals the twin's: a product and a sum in fp32, each rounded to nearest by name (__fmul_rn, __fadd_rn),
// so that no compiler joins them into a fused multiply-add. fp16 and bf16 are that, rounded to nearest even.
//
// Shape of the work: memory is the limit, so a thread takes as many pixels as make a vector of 16 bytes of one
// channel and reads their bytes as words. Where a picture's pixels or an address don't allow that, it takes one
// pixel.
#include <stdint.h>
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace {

constexpr int kThreads = 256;
constexpr int kVector = 16;  // bytes

// -------------------------------------------------------------------------------------------------------------------
// Elements

struct Fp16 {
    uint16_t bits;
};
struct Bf16 {
    uint16_t bits;
};
__device__ __forceinline__ void encode(float value, float& to) { to = value; }
__device__ __forceinline__ void encode(float value, Fp16& to) { to.bits = __half_as_ushort(__float2half_rn(value)); }
__device__ __forceinline__ void encode(float value, Bf16& to) {
    const uint32_t bits = __float_as_uint(value);  // never NaN
    to.bits = (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Written as one.
template <class T>
struct alignas(kVector) Vector {
    T at[kVector / sizeof(T)];
};

template <int Count, class T>
__device__ __forceinline__ void store(const float (&value)[Count], T* to) {
    constexpr int kEach = kVector / (int)sizeof(T);
    if constexpr (Count % kEach == 0) {
#pragma unroll
        for (int i = 0; i < Count; i += kEach) {
            Vector<T> vector;
#pragma unroll
            for (int k = 0; k < kEach; ++k) encode(value[i + k], vector.at[k]);
            *(Vector<T>*)(to + i) = vector;
        }
    } else {
#pragma unroll
        for (int i = 0; i < Count; ++i) encode(value[i], to[i]);
    }
}

// The bytes of so many pixels.
template <int Pixels>
__device__ __forceinline__ void load(const uint8_t* from, uint32_t (&byte)[3 * Pixels]) {
    if constexpr (Pixels % 4 == 0) {
#pragma unroll
        for (int i = 0; i < 3 * Pixels; i += 4) {
            const uint32_t word = __ldg((const uint32_t*)(from + i));
#pragma unroll
            for (int k = 0; k < 4; ++k) byte[i + k] = word >> (8 * k) & 255u;
        }
    } else {
#pragma unroll
        for (int i = 0; i < 3 * Pixels; ++i) byte[i] = __ldg(from + i);
    }
}

// -------------------------------------------------------------------------------------------------------------------
// Pictures

struct Normalisation {
    float scale[3], bias[3];
};

template <bool Planes, int Pixels, class T>
__device__ __forceinline__ void normalise_by(const uint8_t* images, int32_t pixels, const Normalisation& how,
                                             T* out) {
    const int64_t first = (int64_t)blockIdx.x * 3 * pixels;
    const uint8_t* image = images + first;
    T* to = out + first;
    const int64_t stride = (int64_t)gridDim.y * kThreads * Pixels;
    for (int64_t at = ((int64_t)blockIdx.y * kThreads + threadIdx.x) * Pixels; at < pixels; at += stride) {
        uint32_t byte[3 * Pixels];
        load<Pixels>(image + 3 * at, byte);
        float value[3][Pixels], mixed[3 * Pixels];
#pragma unroll
        for (int i = 0; i < 3 * Pixels; ++i) {
            const float v = __fadd_rn(__fmul_rn((float)byte[i], how.scale[i % 3]), how.bias[i % 3]);
            value[i % 3][i / 3] = mixed[i] = v;
        }
        if constexpr (Planes) {
#pragma unroll
            for (int c = 0; c < 3; ++c) store(value[c], to + (int64_t)c * pixels + at);
        } else {
            store(mixed, to + 3 * at);
        }
    }
}

template <bool Planes, class T>
__device__ __forceinline__ void normalise(const uint8_t* images, int32_t pixels, const Normalisation& how, T* out) {
    constexpr int kPixels = kVector / (int)sizeof(T);
    if (pixels % kPixels == 0 && (uintptr_t)images % 4 == 0 && (uintptr_t)out % kVector == 0)
        normalise_by<Planes, kPixels>(images, pixels, how, out);
    else
        normalise_by<Planes, 1>(images, pixels, how, out);
}

}  // namespace

// Block 256, grid (n, any): 2,048 pixels of a picture or more a block are best. No shared memory.
// images       (n, pixels, 3) uint8, any alignment
// pixels       of a picture, H * W, at most 2^28
// s0 s1 s2     scale of red, green, blue; finite
// b0 b1 b2     bias; finite
// out: to      NCHW: (n, 3, pixels), NHWC: (n, pixels, 3), of the type in the name, aligned to it
#define ENTRY(name, planes, type)                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                         \
        name(const uint8_t* __restrict__ images, int32_t pixels, float s0, float s1, float s2, float b0, float b1, \
             float b2, type* __restrict__ to) {                                                                    \
        normalise<planes>(images, pixels, {{s0, s1, s2}, {b0, b1, b2}}, to);                                       \
    }
ENTRY(normalise_nchw_float32, true, float)
ENTRY(normalise_nchw_float16, true, Fp16)
ENTRY(normalise_nchw_bfloat16, true, Bf16)
ENTRY(normalise_nhwc_float32, false, float)
ENTRY(normalise_nhwc_float16, false, Fp16)
ENTRY(normalise_nhwc_bfloat16, false, Bf16)
