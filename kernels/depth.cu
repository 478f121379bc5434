// What stands before and after a monocular depth network: pictures to its input, its prediction to depth maps.
//
// depth_preprocess: resize, then value * scale + bias a channel. Bilinear between pixel centres, mirrored at the
// border without repeating the edge's pixel (index -1 is 1), no smoothing: skimage.transform.resize(order=1) with its
// default mode "reflect" and anti_aliasing=False, by which the original data set went from 224x224 to 448x448
// (docs/depth.md).
// depth_postprocess: resize where sizes differ (bilinear between pixel centres, clamped at the border), depth by the
// prediction's meaning, and the picture's range spread over 0 to 255. The formulas of DenseDepth (Alhashim and Wonka
// 2018, arXiv 1812.11941) as the original data set has them: d = clip(1000 / p, 10, 1000) / 1000, q = (d - min) /
// (max - min), grey = min(255, floor(256 q)).
// Twins: gpufgbg/depth/processing.py. Judge: plain NumPy in tests/test_depth_processing.py, which also runs this file
// on the CPU.
//
// Every byte equals the twins': coordinates are integers, and all that rounds is an fp32 operation rounded to nearest
// by name (__fadd_rn, __fmul_rn, ...), which no compiler joins into a fused multiply-add. fp16 is fp32 rounded to
// nearest even. A picture's result depends on that picture alone.
//
// Shape of the work: a warp takes a row, so what the row needs is computed once, the warp does not diverge over it,
// and consecutive lanes write consecutive vectors. A thread keeps the two columns that its pixels lie between:
// enlarged, it reads a byte twice, not four times a pixel. A depth map is read twice, the second time from the L2
// cache.
//
// Limits: 1 to 16,384 pixels a side.
#include <stdint.h>
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int kPreThreads = 256;
constexpr int kPreResident = 2;  // blocks an SM at least: 128 registers a thread
constexpr int kPostThreads = 1024;
constexpr int kVector = 16;  // bytes
constexpr int kPlanes = 0;   // instead of a number of interleaved channels

// -------------------------------------------------------------------------------------------------------------------
// Elements: float, or uint16_t for the bits of an fp16 number

__device__ __forceinline__ float decode(float value) { return value; }
__device__ __forceinline__ float decode(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ void encode(float value, float& to) { to = value; }
__device__ __forceinline__ void encode(float value, uint16_t& to) { to = __half_as_ushort(__float2half_rn(value)); }

// Read and written as one.
template <class T, int Count>
struct alignas(sizeof(T) * Count) Vector {
    T at[Count];
};

// Writes values as vectors of so many bytes.
template <int Bytes, class T, int Count>
__device__ __forceinline__ void store(const float (&value)[Count], T* to) {
    constexpr int kEach = Bytes / (int)sizeof(T);
    static_assert(Count % kEach == 0, "whole vectors only");
#pragma unroll
    for (int i = 0; i < Count; i += kEach) {
        Vector<T, kEach> vector;
#pragma unroll
        for (int k = 0; k < kEach; ++k) encode(value[i + k], vector.at[k]);
        *(Vector<T, kEach>*)(to + i) = vector;
    }
}

__device__ __forceinline__ bool is_finite(float value) {
    return (__float_as_uint(value) & 0x7F800000u) != 0x7F800000u;
}
__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7FC00000u); }

// -------------------------------------------------------------------------------------------------------------------
// Coordinates

// Where a pixel of the resized axis lies on the source: pixel `at` plus rest / (2 * size), exact.
struct Position {
    int32_t at, rest;
};

// An axis of `source` pixels, resized to `size`.
struct Axis {
    int32_t source, size;

    // ((2 i + 1) * source - size) / (2 * size): between the centres of pixels -1 and `source`
    __device__ __forceinline__ Position position(int32_t i) const {
        const uint32_t shifted = (uint32_t)((2 * i + 1) * source + size), across = 2u * (uint32_t)size;
        const uint32_t quotient = shifted / across;
        return {(int32_t)quotient - 1, (int32_t)(shifted - quotient * across)};
    }
    // What `pixels` of the resized axis are on the source.
    __device__ __forceinline__ Position step(int32_t pixels) const {
        const uint32_t length = (uint32_t)(pixels * source), quotient = length / (uint32_t)size;
        return {(int32_t)quotient, (int32_t)(2u * (length - quotient * (uint32_t)size))};
    }
    __device__ __forceinline__ void advance(Position& position, const Position& step) const {
        position.at += step.at;
        position.rest += step.rest;
        if (position.rest >= 2 * size) {
            position.rest -= 2 * size;
            ++position.at;
        }
    }
    // of the pixel after `at`
    __device__ __forceinline__ float weight(const Position& position) const {
        return __fdiv_rn((float)position.rest, (float)(2 * size));
    }
    __device__ __forceinline__ int32_t mirrored(int32_t i) const {
        if (i < 0) i = -i;
        if (i >= source) i = 2 * source - 2 - i;
        return i < 0 ? 0 : i;  // one pixel is its own mirror image
    }
    __device__ __forceinline__ int32_t clamped(int32_t i) const { return i < 0 ? 0 : i >= source ? source - 1 : i; }
};

// Equal ends give themselves, and nothing leaves what lies between the ends.
__device__ __forceinline__ float between(float first, float second, float weight) {
    return __fadd_rn(first, __fmul_rn(__fsub_rn(second, first), weight));
}

// -------------------------------------------------------------------------------------------------------------------
// Before the network

struct Normalisation {
    float scale[3], bias[3];
};

// A column of two rows, joined. upper, lower: rows of the picture
__device__ __forceinline__ void load_column(const uint8_t* upper, const uint8_t* lower, int32_t column, float weight,
                                            float (&value)[3]) {
#pragma unroll
    for (int c = 0; c < 3; ++c)
        value[c] = between((float)__ldg(upper + 3 * column + c), (float)__ldg(lower + 3 * column + c), weight);
}

// Channels: stored interleaved, or kPlanes; Pixels: a thread and step; Bytes: of what it writes at once
template <int Channels, int Pixels, int Bytes, class T>
__device__ __forceinline__ void preprocess_by(const uint8_t* images, const Axis& down, const Axis& across,
                                              const Normalisation& normalisation, T* inputs) {
    constexpr int kWarps = kPreThreads / kWarp;
    const int32_t lane = (int32_t)threadIdx.x % kWarp, warp = (int32_t)threadIdx.x / kWarp;
    const int64_t plane = (int64_t)down.size * across.size;
    const uint8_t* image = images + (int64_t)blockIdx.x * down.source * across.source * 3;
    T* input = inputs + (int64_t)blockIdx.x * plane * (Channels == kPlanes ? 3 : Channels);
    const Position first = across.position(lane * Pixels);
    const Position one = across.step(1), stride = across.step(kWarp * Pixels);

    for (int32_t row = (int32_t)blockIdx.y * kWarps + warp; row < down.size; row += (int32_t)gridDim.y * kWarps) {
        const Position y = down.position(row);
        const float row_weight = down.weight(y);
        const uint8_t* upper = image + down.mirrored(y.at) * across.source * 3;
        const uint8_t* lower = image + down.mirrored(y.at + 1) * across.source * 3;
        Position start = first;
#pragma unroll 1
        for (int32_t column = lane * Pixels; column < across.size; column += kWarp * Pixels) {
            float value[3][Pixels], left[3], right[3];
            int32_t held = 0;  // the column in left; the one after it is in right
            Position x = start;
#pragma unroll
            for (int k = 0; k < Pixels; ++k) {
                if (k == 0 || x.at != held) {
                    if (k != 0 && x.at == held + 1) {
#pragma unroll
                        for (int c = 0; c < 3; ++c) left[c] = right[c];
                    } else {
                        load_column(upper, lower, across.mirrored(x.at), row_weight, left);
                    }
                    load_column(upper, lower, across.mirrored(x.at + 1), row_weight, right);
                    held = x.at;
                }
                const float weight = across.weight(x);
#pragma unroll
                for (int c = 0; c < 3; ++c)
                    value[c][k] = __fadd_rn(__fmul_rn(between(left[c], right[c], weight), normalisation.scale[c]),
                                            normalisation.bias[c]);
                across.advance(x, one);
            }
            const int64_t pixel = (int64_t)row * across.size + column;
            if constexpr (Channels == kPlanes) {
#pragma unroll
                for (int c = 0; c < 3; ++c) store<Bytes>(value[c], input + c * plane + pixel);
            } else {
                float interleaved[Pixels * Channels] = {};
#pragma unroll
                for (int k = 0; k < Pixels; ++k)
#pragma unroll
                    for (int c = 0; c < 3; ++c) interleaved[k * Channels + c] = value[c][k];
                store<Bytes>(interleaved, input + pixel * Channels);
            }
            across.advance(start, stride);
        }
    }
}

// Takes as many pixels a thread as fill a vector and divide the row, else a word's, else one.
template <int Channels, class T>
__device__ __forceinline__ void preprocess(const uint8_t* images, const Axis& down, const Axis& across,
                                           const Normalisation& normalisation, T* inputs) {
    constexpr int kSize = (int)sizeof(T), kInterleaved = Channels % 4 ? 1 : Channels == kPlanes ? 1 : Channels;
    constexpr int kPixels = kVector / kSize > kInterleaved ? kVector / kSize / kInterleaved : 1;
    const uint32_t address = (uint32_t)(uintptr_t)inputs;
    if (address % kVector == 0 && across.size % kPixels == 0)
        preprocess_by<Channels, kPixels, kVector>(images, down, across, normalisation, inputs);
    else if (kSize == 2 && kInterleaved == 1 && address % 4 == 0 && across.size % 2 == 0)
        preprocess_by<Channels, 4 / kSize, 4>(images, down, across, normalisation, inputs);
    else
        preprocess_by<Channels, 1, kSize>(images, down, across, normalisation, inputs);
}

template <class T>
__device__ __forceinline__ void preprocess_interleaved(const uint8_t* images, const Axis& down, const Axis& across,
                                                       int32_t channels, const Normalisation& normalisation,
                                                       T* inputs) {
    if (channels == 3)
        preprocess<3>(images, down, across, normalisation, inputs);
    else if (channels == 4)
        preprocess<4>(images, down, across, normalisation, inputs);
    else
        preprocess<8>(images, down, across, normalisation, inputs);
}

// -------------------------------------------------------------------------------------------------------------------
// After the network

// What a prediction p means: `meaning` of the entries.
constexpr int32_t kInverse = 1, kDisparity = 2;

// Depth of a prediction, not a number where the prediction is none that can be used.
__device__ __forceinline__ float depth_of(float prediction, int32_t meaning) {
    float depth = meaning == kDisparity ? -prediction : prediction;
    if (meaning == kInverse) {
        const float distance = __fdiv_rn(1000.0f, prediction);
        const float near = distance < 10.0f ? 10.0f : distance;
        depth = __fdiv_rn(near > 1000.0f ? 1000.0f : near, 1000.0f);
    }
    // -0 becomes 0: the order of the two in a minimum would depend on the order of threads
    return is_finite(prediction) ? __fadd_rn(depth, 0.0f) : not_a_number();
}

// A picture's depth, Pixels at a time: use(index of the first pixel, their depths).
template <int Pixels, class T, class Use>
__device__ __forceinline__ void each_depth(const T* prediction, const Axis& down, const Axis& across, int32_t meaning,
                                           const Use& use) {
    const int32_t count = down.size * across.size;
#pragma unroll 2
    for (int32_t i = (int32_t)threadIdx.x * Pixels; i < count; i += kPostThreads * Pixels) {
        const Vector<T, Pixels> value = *(const Vector<T, Pixels>*)(prediction + i);
        float depth[Pixels];
#pragma unroll
        for (int k = 0; k < Pixels; ++k) depth[k] = depth_of(decode(value.at[k]), meaning);
        use(i, depth);
    }
}

// The same of the resized picture. A pixel of weight 0 is not looked at, so that the same size gives the same.
template <int Pixels, class T, class Use>
__device__ __forceinline__ void each_resized_depth(const T* prediction, const Axis& down, const Axis& across,
                                                   int32_t meaning, const Use& use) {
    constexpr int kWarps = kPostThreads / kWarp;
    const int32_t lane = (int32_t)threadIdx.x % kWarp, warp = (int32_t)threadIdx.x / kWarp;
    const Position first = across.position(lane * Pixels);
    const Position one = across.step(1), stride = across.step(kWarp * Pixels);
    for (int32_t row = warp; row < down.size; row += kWarps) {
        const Position y = down.position(row);
        const float row_weight = down.weight(y);
        const T* upper = prediction + down.clamped(y.at) * across.source;
        const T* lower = prediction + down.clamped(y.at + 1) * across.source;
        const auto load = [&](int32_t column) {
            const float value = decode(upper[column]);
            return y.rest ? between(value, decode(lower[column]), row_weight) : value;
        };
        Position start = first;
#pragma unroll 1
        for (int32_t column = lane * Pixels; column < across.size; column += kWarp * Pixels) {
            float depth[Pixels];
            Position x = start;
#pragma unroll
            for (int k = 0; k < Pixels; ++k) {
                float value = load(across.clamped(x.at));
                if (x.rest) value = between(value, load(across.clamped(x.at + 1)), across.weight(x));
                depth[k] = depth_of(value, meaning);
                across.advance(x, one);
            }
            use(row * across.size + column, depth);
            across.advance(start, stride);
        }
    }
}

// The least of low, the most of high and the sum of count over the block, for all of its threads.
__device__ __forceinline__ void join(float& low, float& high, int32_t& count) {
    __shared__ float lows[kWarp], highs[kWarp];
    __shared__ int32_t counts[kWarp];
    static_assert(kPostThreads == kWarp * kWarp, "as many warps as lanes");
    const int lane = (int)threadIdx.x % kWarp, warp = (int)threadIdx.x / kWarp;
#pragma unroll
    for (int round = 0; round < 2; ++round) {
#pragma unroll
        for (int step = kWarp / 2; step; step /= 2) {
            const float other_low = __uint_as_float(__shfl_xor_sync(kAllLanes, __float_as_uint(low), step));
            const float other_high = __uint_as_float(__shfl_xor_sync(kAllLanes, __float_as_uint(high), step));
            low = other_low < low ? other_low : low;
            high = other_high > high ? other_high : high;
            count += __shfl_xor_sync(kAllLanes, count, step);
        }
        if (round == 1) return;
        if (lane == 0) lows[warp] = low, highs[warp] = high, counts[warp] = count;
        __syncthreads();
        low = lows[lane], high = highs[lane], count = counts[lane];
    }
}

struct Maps {
    uint8_t* grey;
    float *metres, *range;
    int32_t* faults;
};

template <bool Resized, int Pixels, class T>
__device__ __forceinline__ void postprocess_by(const T* predictions, const Axis& down, const Axis& across,
                                               int32_t meaning, float scale, const Maps& maps) {
    const int64_t n = blockIdx.x;
    const int32_t source = down.source * across.source;
    const T* prediction = predictions + n * source;
    const auto each = [&](const auto& use) {
        if constexpr (Resized)
            each_resized_depth<Pixels>(prediction, down, across, meaning, use);
        else
            each_depth<Pixels>(prediction, down, across, meaning, use);
    };

    float low = __uint_as_float(0x7F800000u), high = -low;
    int32_t faults = 0;
    each([&](int32_t, const float (&depth)[Pixels]) {
#pragma unroll
        for (int k = 0; k < Pixels; ++k) {
            // comparisons with what is not a number are false
            low = depth[k] < low ? depth[k] : low;
            high = depth[k] > high ? depth[k] : high;
            if (!Resized) faults += depth[k] != depth[k];
        }
    });
    if (Resized)
        for (int32_t i = (int32_t)threadIdx.x; i < source; i += kPostThreads)
            faults += !is_finite(decode(prediction[i]));
    join(low, high, faults);

    if (threadIdx.x == 0) {
        const bool any = low <= high;
        maps.range[2 * n] = any ? __fmul_rn(low, scale) : not_a_number();
        maps.range[2 * n + 1] = any ? __fmul_rn(high, scale) : not_a_number();
        maps.faults[n] = faults;
    }

    const float span = __fsub_rn(high, low);
    const int64_t pixels = (int64_t)down.size * across.size;
    uint8_t* grey = maps.grey + n * pixels;
    float* metres = maps.metres ? maps.metres + n * pixels : nullptr;
    each([&](int32_t i, const float (&depth)[Pixels]) {
        Vector<uint8_t, Pixels> level;
#pragma unroll
        for (int k = 0; k < Pixels; ++k) {
            const float share = __fdiv_rn(__fsub_rn(depth[k], low), span);
            const int32_t step = share > 0.0f ? (int32_t)__fmul_rn(share, 256.0f) : 0;  // 0 where it is no number
            level.at[k] = (uint8_t)(step > 255 ? 255 : step);
        }
        *(Vector<uint8_t, Pixels>*)(grey + i) = level;
        if (metres) {
            Vector<float, Pixels> length;
#pragma unroll
            for (int k = 0; k < Pixels; ++k)
                length.at[k] = depth[k] == depth[k] ? __fmul_rn(depth[k], scale) : not_a_number();
            *(Vector<float, Pixels>*)(metres + i) = length;
        }
    });
}

// Takes four pixels a thread where vectors of them lie whole, else one.
template <class T>
__device__ __forceinline__ void postprocess(const T* predictions, const Axis& down, const Axis& across,
                                            int32_t meaning, float scale, const Maps& maps) {
    constexpr int kPixels = 4;
    const bool outputs = (uintptr_t)maps.grey % kPixels == 0 && (uintptr_t)maps.metres % (4 * kPixels) == 0;
    const bool inputs = (uintptr_t)predictions % (kPixels * sizeof(T)) == 0;
    if (down.source != down.size || across.source != across.size) {
        if (outputs && across.size % kPixels == 0)
            postprocess_by<true, kPixels>(predictions, down, across, meaning, scale, maps);
        else
            postprocess_by<true, 1>(predictions, down, across, meaning, scale, maps);
    } else {
        if (inputs && outputs && down.size * across.size % kPixels == 0)
            postprocess_by<false, kPixels>(predictions, down, across, meaning, scale, maps);
        else
            postprocess_by<false, 1>(predictions, down, across, meaning, scale, maps);
    }
}

}  // namespace

// Block 256, grid (N, blocks a picture): (input_height + 7) / 8 of them give a warp a row; with fewer it takes more.
// images       (N, height, width, 3) uint8
// scale, bias  of red, green, blue: input = value * scale + bias
// out: inputs  (N, 3, input_height, input_width) fp16 or fp32
extern "C" __global__ void __launch_bounds__(kPreThreads, kPreResident)
    depth_preprocess_nchw_half(const uint8_t* __restrict__ images, int32_t height, int32_t width,
                               int32_t input_height, int32_t input_width, float scale_red, float scale_green,
                               float scale_blue, float bias_red, float bias_green, float bias_blue,
                               uint16_t* __restrict__ inputs) {
    const Normalisation normalisation = {{scale_red, scale_green, scale_blue}, {bias_red, bias_green, bias_blue}};
    preprocess<kPlanes>(images, {height, input_height}, {width, input_width}, normalisation, inputs);
}
extern "C" __global__ void __launch_bounds__(kPreThreads, kPreResident)
    depth_preprocess_nchw_float(const uint8_t* __restrict__ images, int32_t height, int32_t width,
                                int32_t input_height, int32_t input_width, float scale_red, float scale_green,
                                float scale_blue, float bias_red, float bias_green, float bias_blue,
                                float* __restrict__ inputs) {
    const Normalisation normalisation = {{scale_red, scale_green, scale_blue}, {bias_red, bias_green, bias_blue}};
    preprocess<kPlanes>(images, {height, input_height}, {width, input_width}, normalisation, inputs);
}

// The same, with
// channels     of the input: 3, or 4 or 8, of which the last are 0
// out: inputs  (N, input_height, input_width, channels) fp16 or fp32
extern "C" __global__ void __launch_bounds__(kPreThreads, kPreResident)
    depth_preprocess_nhwc_half(const uint8_t* __restrict__ images, int32_t height, int32_t width,
                               int32_t input_height, int32_t input_width, int32_t channels, float scale_red,
                               float scale_green, float scale_blue, float bias_red, float bias_green, float bias_blue,
                               uint16_t* __restrict__ inputs) {
    const Normalisation normalisation = {{scale_red, scale_green, scale_blue}, {bias_red, bias_green, bias_blue}};
    preprocess_interleaved(images, {height, input_height}, {width, input_width}, channels, normalisation, inputs);
}
extern "C" __global__ void __launch_bounds__(kPreThreads, kPreResident)
    depth_preprocess_nhwc_float(const uint8_t* __restrict__ images, int32_t height, int32_t width,
                                int32_t input_height, int32_t input_width, int32_t channels, float scale_red,
                                float scale_green, float scale_blue, float bias_red, float bias_green,
                                float bias_blue, float* __restrict__ inputs) {
    const Normalisation normalisation = {{scale_red, scale_green, scale_blue}, {bias_red, bias_green, bias_blue}};
    preprocess_interleaved(images, {height, input_height}, {width, input_width}, channels, normalisation, inputs);
}

// Block 1024, grid N: a block a picture. Shared memory, static: 0.4 KB.
// predictions  (N, prediction_height, prediction_width) fp16 or fp32
// meaning      0: d = p; 1: DenseDepth's, d = clip(1000 / p, 10, 1000) / 1000; 2: disparity, d = -p
// scale        metres = d * scale, above 0
// out: grey    (N, height, width) uint8; 0 where depth is unknown, or everywhere if all depths are equal
// out: metres  (N, height, width) float, NaN where depth is unknown; or null
// out: range   (N, 2) float, least and most depth in metres; NaN where no depth is known
// out: faults  (N) int32, how many values of the prediction are infinite or NaN: unknown depths
extern "C" __global__ void __launch_bounds__(kPostThreads)
    depth_postprocess_half(const uint16_t* __restrict__ predictions, int32_t prediction_height,
                           int32_t prediction_width, int32_t height, int32_t width, int32_t meaning, float scale,
                           uint8_t* __restrict__ grey, float* __restrict__ metres, float* __restrict__ range,
                           int32_t* __restrict__ faults) {
    postprocess(predictions, {prediction_height, height}, {prediction_width, width}, meaning, scale,
                {grey, metres, range, faults});
}
extern "C" __global__ void __launch_bounds__(kPostThreads)
    depth_postprocess_float(const float* __restrict__ predictions, int32_t prediction_height,
                            int32_t prediction_width, int32_t height, int32_t width, int32_t meaning, float scale,
                            uint8_t* __restrict__ grey, float* __restrict__ metres, float* __restrict__ range,
                            int32_t* __restrict__ faults) {
    postprocess(predictions, {prediction_height, height}, {prediction_width, width}, meaning, scale,
                {grey, metres, range, faults});
}
