// Pictures as a network's input: bytes to floating point, value * scale + bias a channel, pixel by pixel or plane by
// plane.
//
// Twin: gpufgbg/normalise.py. Judge: plain NumPy in tests/test_normalise.py, which also runs this file on the CPU.
//
// Every bit equals the twin's: a product and a sum in fp32, each rounded to nearest by name (__fmul_rn, __fadd_rn),
// so that no compiler joins them into a fused multiply-add. fp16 and bf16 are that, rounded to nearest even.
//
// Shape of the work: memory is the limit. A thread writes vectors of 16 bytes, consecutive lanes consecutive ones,
// streaming (__stcs): kept in the L2 cache, they made that the limit. Plane by plane a vector has as many pixels,
// whose bytes are read as words; pixel by pixel it has as many bytes, and its first is of any channel. Where a
// picture's pixels or an address don't allow vectors, a thread takes one pixel.
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
__device__ __forceinline__ uint32_t bits_of(float value, float) { return __float_as_uint(value); }
__device__ __forceinline__ uint32_t bits_of(float value, Fp16) { return __half_as_ushort(__float2half_rn(value)); }
__device__ __forceinline__ uint32_t bits_of(float value, Bf16) {
    const uint32_t bits = __float_as_uint(value);  // never NaN
    return (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}
__device__ __forceinline__ void write(float value, float* to) { *to = value; }
__device__ __forceinline__ void write(float value, Fp16* to) { to->bits = (uint16_t)bits_of(value, Fp16()); }
__device__ __forceinline__ void write(float value, Bf16* to) { to->bits = (uint16_t)bits_of(value, Bf16()); }

// How many make a vector.
template <class T>
constexpr int kEach = kVector / (int)sizeof(T);

// Writes a vector.
template <class T>
__device__ __forceinline__ void write_all(const float (&value)[kEach<T>], T* to) {
    constexpr int kWords = 4, kInWord = kEach<T> / kWords;
    uint32_t word[kWords] = {};
#pragma unroll
    for (int i = 0; i < kEach<T>; ++i) word[i / kInWord] |= bits_of(value[i], T()) << (32 / kInWord * (i % kInWord));
    __stcs((uint4*)to, make_uint4(word[0], word[1], word[2], word[3]));
}

// Reads bytes, of whole words.
template <int Count>
__device__ __forceinline__ void read_all(const uint8_t* from, uint32_t (&byte)[Count]) {
    static_assert(Count % 4 == 0, "whole words");
#pragma unroll
    for (int i = 0; i < Count; i += 4) {
        const uint32_t word = __ldg((const uint32_t*)(from + i));
#pragma unroll
        for (int k = 0; k < 4; ++k) byte[i + k] = word >> (8 * k) & 255u;
    }
}

// -------------------------------------------------------------------------------------------------------------------
// Pictures

struct Normalisation {
    float scale[3], bias[3];
};

__device__ __forceinline__ float normalised(uint32_t byte, float scale, float bias) {
    return __fadd_rn(__fmul_rn((float)byte, scale), bias);
}

__device__ __forceinline__ float of_channel(const float (&values)[3], int channel) {
    return channel == 0 ? values[0] : channel == 1 ? values[1] : values[2];
}

// A picture to three planes, a vector of each at a time.
template <class T>
__device__ __forceinline__ void to_planes(const uint8_t* image, int64_t pixels, const Normalisation& how, T* to) {
    constexpr int kPixels = kEach<T>;
    const int64_t stride = (int64_t)gridDim.x * kThreads * kPixels;
    for (int64_t at = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * kPixels; at < pixels; at += stride) {
        uint32_t byte[3 * kPixels];
        read_all(image + 3 * at, byte);
#pragma unroll
        for (int c = 0; c < 3; ++c) {
            float value[kPixels];
#pragma unroll
            for (int k = 0; k < kPixels; ++k) value[k] = normalised(byte[3 * k + c], how.scale[c], how.bias[c]);
            write_all(value, to + c * pixels + at);
        }
    }
}

// A picture to pixels, a vector at a time.
template <class T>
__device__ __forceinline__ void to_pixels(const uint8_t* image, int64_t pixels, const Normalisation& how, T* to) {
    constexpr int kValues = kEach<T>;
    const int64_t stride = (int64_t)gridDim.x * kThreads * kValues;
    for (int64_t at = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * kValues; at < 3 * pixels; at += stride) {
        uint32_t byte[kValues];
        read_all(image + at, byte);
        const int first = (int)((uint32_t)at % 3u);
        float scale[3], bias[3], value[kValues];
#pragma unroll
        for (int k = 0; k < 3; ++k) {
            const int channel = first + k < 3 ? first + k : first + k - 3;
            scale[k] = of_channel(how.scale, channel);
            bias[k] = of_channel(how.bias, channel);
        }
#pragma unroll
        for (int k = 0; k < kValues; ++k) value[k] = normalised(byte[k], scale[k % 3], bias[k % 3]);
        write_all(value, to + at);
    }
}

// A picture of any size, anywhere, a pixel at a time.
template <bool Planes, class T>
__device__ __forceinline__ void one_by_one(const uint8_t* image, int64_t pixels, const Normalisation& how, T* to) {
    const int64_t stride = (int64_t)gridDim.x * kThreads;
    for (int64_t at = (int64_t)blockIdx.x * kThreads + threadIdx.x; at < pixels; at += stride)
#pragma unroll
        for (int c = 0; c < 3; ++c)
            write(normalised(__ldg(image + 3 * at + c), how.scale[c], how.bias[c]),
                  to + (Planes ? c * pixels + at : 3 * at + c));
}

template <bool Planes, class T>
__device__ __forceinline__ void normalise(const uint8_t* images, int32_t count, int32_t pixels,
                                          const Normalisation& how, T* out) {
    const bool whole = pixels % kEach<T> == 0 && (uintptr_t)images % 4 == 0 && (uintptr_t)out % kVector == 0;
    for (int32_t n = (int32_t)blockIdx.y; n < count; n += (int32_t)gridDim.y) {
        const int64_t first = (int64_t)n * 3 * pixels;
        if (!whole)
            one_by_one<Planes>(images + first, pixels, how, out + first);
        else if (Planes)
            to_planes(images + first, pixels, how, out + first);
        else
            to_pixels(images + first, pixels, how, out + first);
    }
}

}  // namespace

// Block 256, grid (any, any): 2,048 pixels of a picture or more a block are best, (pixels / 2048, n).
// No shared memory.
//
// images       (n, pixels, 3) uint8, any alignment
// n            pictures
// pixels       of a picture, H * W, at most 2^28
// s0 s1 s2     scale of red, green, blue; finite
// b0 b1 b2     bias; finite
//
// out: to      NCHW: (n, 3, pixels), NHWC: (n, pixels, 3), of the type in the name, aligned to it
#define ENTRY(name, planes, type)                                                                                   \
    extern "C" __global__ void __launch_bounds__(kThreads)                                                          \
        name(const uint8_t* __restrict__ images, int32_t n, int32_t pixels, float s0, float s1, float s2, float b0, \
             float b1, float b2, type* __restrict__ to) {                                                           \
        normalise<planes>(images, n, pixels, {{s0, s1, s2}, {b0, b1, b2}}, to);                                     \
    }
ENTRY(normalise_nchw_float32, true, float)
ENTRY(normalise_nchw_float16, true, Fp16)
ENTRY(normalise_nchw_bfloat16, true, Bf16)
ENTRY(normalise_nhwc_float32, false, float)
ENTRY(normalise_nhwc_float16, false, Fp16)
ENTRY(normalise_nhwc_bfloat16, false, Bf16)
