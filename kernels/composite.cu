// Composites and masks for a batch of samples, straight from the packed assets.
//
// Algorithm: the placement comes from Philox (key = seed, counter = sample index) or from the caller, the composite
// is Pillow's paste of the foreground through its own alpha, the mask its grey mask pasted through itself onto black.
// Bytes are decided by blend.cuh and philox.cuh. Twin: gpufgbg/backends/cpu.py. Judge: Pillow, on the GPU and,
// through tests/host/cuda_emulator.h, in tests/test_kernels_emulated.py.
//
// Shape of the work. A 224x224 sample is 200 kB written, and the backgrounds are few enough to stay in the L2 cache
// (in order of index even in L1: neighbours share theirs), so writing is the limit and all else must hide behind it.
// - Pictures are flat arrays of 16-byte vectors; consecutive lanes write consecutive vectors, streaming (__stcs), so
//   that they don't push the backgrounds out. An output byte is written once and never read.
// - A block has a band of rows of one sample, usually all of them. It copies the vectors outside of the foreground's
//   *window* (in the mask: clears), four loads in flight a thread, then blends those in the window. They share no
//   byte, so there is no barrier between. Apart, the blend has full warps; mixed into the copy, half of all warps
//   would wait for a third of their lanes.
// - A vector of a composite is 16 bytes of six pixels and begins with any of the three channels. Its pixels are
//   joined to words of bytes and shifted into place without a branch; products are byte dot products, the division
//   by 255 works on two lanes of 16 bits.
// - Statistics are what the foreground changes, as the sums over the backgrounds are known beforehand: only the
//   window is counted, where both bytes are in registers.
// Frames whose width is no multiple of 16, or arrays that are not aligned to 16 bytes, take a thread a pixel.
//
// A function of the user's own in place of the blend: this file with GPUFGBG_USER_BLEND, as LTO-IR, which
// gpufgbg/blend.py links with the function's. All else is the same, the mask too.
//
// Limits: frames up to 16,384 a side (a picture's bytes are numbered with 32 bits), foregrounds inside the frame.
#include "blend.cuh"
#include "philox.cuh"

using namespace gpufgbg;

#if defined(GPUFGBG_USER_BLEND)
// A composite's byte, 0 to 255, from the foreground's and the background's, the foreground's straight alpha, each 0
// to 255, and the pixel's place in the frame. Called for each channel of each pixel of the foreground's rectangle.
extern "C" __device__ int32_t gpufgbg_blend(int32_t foreground, int32_t background, int32_t alpha, int32_t x,
                                            int32_t y);
#endif

namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kResident = 4;      // blocks an SM at least: 64 registers a thread
constexpr int kUnroll = 4;        // loads in flight a thread
constexpr int kVector = 16;       // bytes
constexpr int kVectorPixels = 6;  // of a composite, that have bytes in a vector, at most
// Windows begin and end at 32 bytes, the sectors of the L2 cache, so that none is written in two parts, far apart.
constexpr int kEdge = 32 / kVector;
constexpr int kSums = 6;  // of the differences a channel, then of the squares' differences
// Bytes of a channel that a lane counts in 32 bits before they are added up, so that a warp's sum fits too.
constexpr int kCountedBytes = 0x7FFFFFFF / (kWarp * 255 * 255);

struct Assets {
    const uint8_t* backgrounds;
    const uint32_t* foregrounds;
    const uint8_t* masks;
    const int64_t* offsets;
    const int32_t *widths, *heights;
    int32_t width, height;  // of the frame
};

struct Placement {
    int32_t background, foreground, flip, x, y;
};
constexpr int kPlacement = 5;

// A placement with what its foreground is.
struct Sample {
    Placement at;
    int32_t width, height;
    int64_t offset;
};

__device__ __forceinline__ int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
__device__ __forceinline__ int32_t between(int32_t low, int32_t v, int32_t high) {
    return v < low ? low : v > high ? high : v;
}

__device__ __forceinline__ int32_t warp_sum(int32_t v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return (int32_t)__reduce_add_sync(kAllLanes, (uint32_t)v);
#else
#pragma unroll
    for (int step = kWarp / 2; step; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
    return v;
#endif
}

// Adds a warp's sums to its part and clears them.
__device__ __forceinline__ void add_up(int32_t (&sums)[kSums], long long* part) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        const int32_t sum = warp_sum(sums[i]);
        if (threadIdx.x % kWarp == 0) part[i] += sum;
        sums[i] = 0;
    }
}

// The threads of a block over the cells of a grid, row by row: cell threadIdx.x first, then kThreads further each
// time. Two divisions at the start, none on the way.
struct Walk {
    int32_t row, column, across, rows, columns;
    __device__ __forceinline__ explicit Walk(int32_t cells_across) : across(cells_across) {
        row = (int32_t)((uint32_t)threadIdx.x / (uint32_t)across);
        column = (int32_t)threadIdx.x - row * across;
        rows = (int32_t)((uint32_t)kThreads / (uint32_t)across);
        columns = kThreads - rows * across;
    }
    __device__ __forceinline__ void advance() {
        row += rows;
        column += columns;
        if (column >= across) {
            column -= across;
            ++row;
        }
    }
};

// -------------------------------------------------------------------------------------------------------------------
// Vectors

// Rows and vectors of a picture that hold the foreground, those of the band only.
struct Window {
    int32_t top, left, rows, columns;
    __device__ __forceinline__ bool holds(int32_t row, int32_t column) const {
        return (uint32_t)(row - top) < (uint32_t)rows && (uint32_t)(column - left) < (uint32_t)columns;
    }
};

// pixel_bytes  3 or 1; across: vectors in a row of the frame
__device__ __forceinline__ Window make_window(const Sample& sample, int32_t top, int32_t bottom, int32_t pixel_bytes,
                                              int32_t across) {
    constexpr int kStep = kEdge * kVector;
    const int32_t first = between(top, sample.at.y, bottom);
    const int32_t last = between(top, sample.at.y + sample.height, bottom);
    const int32_t left = sample.at.x * pixel_bytes / kStep * kEdge;
    const int32_t right = ((sample.at.x + sample.width) * pixel_bytes + kStep - 1) / kStep * kEdge;
    return {first, left, last - first, least(right, across) - left};
}

// Writes the band's vectors outside of the window: as they are in the picture, or 0.
template <bool Copy>
__device__ __forceinline__ void fill_around(const Window& window, int32_t top, int32_t bottom, int32_t across,
                                            const uint4* picture, uint4* to) {
    Walk walk(across);
    walk.row += top;
    if constexpr (Copy) picture += top * across + (int32_t)threadIdx.x;
    to += top * across + (int32_t)threadIdx.x;
#pragma unroll 1
    while (walk.row < bottom) {
        uint4 value[kUnroll];
        bool outside[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            outside[u] = walk.row < bottom && !window.holds(walk.row, walk.column);
            if constexpr (Copy) {
                if (outside[u]) value[u] = __ldg(picture + u * kThreads);
            } else {
                value[u] = make_uint4(0u, 0u, 0u, 0u);
            }
            walk.advance();
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
            if (outside[u]) __stcs(to + u * kThreads, value[u]);
        if constexpr (Copy) picture += kUnroll * kThreads;
        to += kUnroll * kThreads;
    }
}

// Six pixels byte after byte: red, green, blue of each in colour, and as often its alpha. A pixel is a word, red in
// its low byte, alpha in its high one.
__device__ __forceinline__ void spread(const uint32_t (&p)[kVectorPixels], uint32_t (&colour)[5],
                                       uint32_t (&alpha)[5]) {
    colour[0] = __byte_perm(p[0], p[1], 0x4210), colour[1] = __byte_perm(p[1], p[2], 0x5421);
    colour[2] = __byte_perm(p[2], p[3], 0x6542), colour[3] = __byte_perm(p[4], p[5], 0x4210);
    colour[4] = p[5] >> 8;
    alpha[0] = __byte_perm(p[0], p[1], 0x7333), alpha[1] = __byte_perm(p[1], p[2], 0x7733);
    alpha[2] = __byte_perm(p[2], p[3], 0x7773), alpha[3] = __byte_perm(p[4], p[5], 0x7333);
    alpha[4] = __byte_perm(p[5], p[5], 0x7733);
}

#if !defined(GPUFGBG_USER_BLEND)

// blend() of four bytes: a byte dot product (old, over) . (255 - alpha, alpha) each, and div255() in lanes of 16
// bits, which neither 255 * 255 + 128 nor that plus its high byte leaves.
__device__ __forceinline__ uint32_t blend_four(uint32_t old, uint32_t over, uint32_t alpha) {
    const uint32_t keep = ~alpha;
    const uint32_t low = __byte_perm(old, over, 0x5140), high = __byte_perm(old, over, 0x7362);
    const uint32_t low_by = __byte_perm(keep, alpha, 0x5140), high_by = __byte_perm(keep, alpha, 0x7362);
    uint32_t first =
        __byte_perm(__dp4a(low, low_by & 0x0000FFFFu, 128u), __dp4a(low, low_by & 0xFFFF0000u, 128u), 0x5410);
    uint32_t second =
        __byte_perm(__dp4a(high, high_by & 0x0000FFFFu, 128u), __dp4a(high, high_by & 0xFFFF0000u, 128u), 0x5410);
    first += __byte_perm(first, 0u, 0x4341);
    second += __byte_perm(second, 0u, 0x4341);
    return __byte_perm(first, second, 0x7531);
}

// Vector of a composite that begins with channel `phase` of the first of six pixels; 0 leaves the background as it
// is.
__device__ __forceinline__ void blend_vector(const uint32_t (&pixel)[kVectorPixels], int32_t phase,
                                             const uint32_t (&old)[4], uint32_t (&blended)[4]) {
    uint32_t colour[5], alpha[5];
    spread(pixel, colour, alpha);
    const uint32_t shift = 8u * (uint32_t)phase;
#pragma unroll
    for (int k = 0; k < 4; ++k)
        blended[k] = blend_four(old[k], __funnelshift_r(colour[k], colour[k + 1], shift),
                                __funnelshift_r(alpha[k], alpha[k + 1], shift));
}

#else

// Vector of a composite that begins with channel `phase` of the first of six pixels, and this with column x of the
// sample's foreground. Where alpha is 0, the function may still change the background: the place tells what is
// outside.
__device__ __forceinline__ void blend_vector(const uint32_t (&pixel)[kVectorPixels], int32_t phase,
                                             const uint32_t (&old)[4], uint32_t (&blended)[4], const Sample& sample,
                                             int32_t x, int32_t y) {
    uint32_t colour[5], alpha[5];
    spread(pixel, colour, alpha);
    const uint32_t shift = 8u * (uint32_t)phase;
    const int32_t columns[3] = {x, x + (phase == 2), x + (phase >= 1)};  // of bytes 0, 1 and 2; one more each 3 bytes
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const uint32_t colours = __funnelshift_r(colour[k], colour[k + 1], shift);
        const uint32_t alphas = __funnelshift_r(alpha[k], alpha[k + 1], shift);
        uint32_t bytes[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int byte = 4 * k + i;
            const int32_t column = columns[byte % 3] + byte / 3;
            const int32_t over = (int32_t)(colours >> 8 * i & 255u), by = (int32_t)(alphas >> 8 * i & 255u);
            const int32_t under = (int32_t)(old[k] >> 8 * i & 255u);
            const bool inside = (uint32_t)column < (uint32_t)sample.width;
            const int32_t made = gpufgbg_blend(over, under, by, sample.at.x + column, y);
            bytes[i] = (uint32_t)(inside ? made : under);
        }
        blended[k] = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | bytes[3] << 24;
    }
}

#endif

// Adds the 5 or 6 bytes of one channel in a vector, and their squares: bytes Start, Start + 3, ...
template <int Start>
__device__ __forceinline__ void count_bytes(const uint32_t (&word)[4], uint32_t& sum, uint32_t& squares) {
    // four of them gathered from words 0 to 2, what is left in word 3
    constexpr uint32_t kTwoWords = Start == 0 ? 0x0630 : Start == 1 ? 0x0741 : 0x0052;
    constexpr uint32_t kThird = Start == 0 ? 0x5210 : Start == 1 ? 0x6210 : 0x7410;
    constexpr uint32_t kOnes = Start == 0 ? 0x01000001u : Start == 1 ? 0x00000100u : 0x00010000u;
    const uint32_t four = __byte_perm(__byte_perm(word[0], word[1], kTwoWords), word[2], kThird);
    sum = __dp4a(word[3], kOnes, __dp4a(four, 0x01010101u, sum));
    squares = __dp4a(word[3], word[3] & (kOnes * 255u), __dp4a(four, four, squares));
}

// Adds what the blend changed in a vector that begins with channel `phase`.
__device__ __forceinline__ void count_vector(const uint32_t (&old)[4], const uint32_t (&blended)[4], int32_t phase,
                                             int32_t (&sums)[kSums]) {
    uint32_t before[kSums] = {}, after[kSums] = {};  // counted from the vector's first channel
    count_bytes<0>(old, before[0], before[3]);
    count_bytes<1>(old, before[1], before[4]);
    count_bytes<2>(old, before[2], before[5]);
    count_bytes<0>(blended, after[0], after[3]);
    count_bytes<1>(blended, after[1], after[4]);
    count_bytes<2>(blended, after[2], after[5]);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
        const int kind = i / 3 * 3, c = i % 3, from1 = kind + (c + 2) % 3, from2 = kind + (c + 1) % 3;
        const uint32_t change0 = after[i] - before[i];
        const uint32_t change1 = after[from1] - before[from1], change2 = after[from2] - before[from2];
        sums[i] += (int32_t)(phase == 0 ? change0 : phase == 1 ? change1 : change2);
    }
}

// A band of a composite. picture, composite: of this sample.
__device__ __forceinline__ void composite_vectors(const Assets& assets, const Sample& sample, int32_t top,
                                                  int32_t bottom, const uint4* picture, uint4* composite,
                                                  long long* part) {
    constexpr int kMostSteps = kCountedBytes / kVectorPixels;
    const int32_t across = assets.width * 3 / kVector;
    const Window window = make_window(sample, top, bottom, 3, across);
    fill_around<true>(window, top, bottom, across, picture, composite);

    const uint32_t* foreground = assets.foregrounds + sample.offset;
    const int32_t count = window.rows * window.columns;
    if (count <= 0) return;
    const bool flip = sample.at.flip != 0;
    Walk walk(window.columns);
    for (int32_t start = 0; start < count; start += kMostSteps * kThreads) {
        const int32_t end = least(count, start + kMostSteps * kThreads);
        int32_t sums[kSums] = {};
#pragma unroll 1
        for (int32_t i = start + (int32_t)threadIdx.x; i < end; i += kThreads) {
            const int32_t row = window.top + walk.row, column = window.left + walk.column;
            walk.advance();
            const int32_t at = row * across + column;
            const int32_t byte = column * kVector, first = byte / 3, phase = byte - 3 * first;
            const uint4 loaded = __ldg(picture + at);
            // flipped, the same run of pixels lies the other way round, and so far from the row's end
            const int32_t x = first - sample.at.x, from = flip ? sample.width - kVectorPixels - x : x;
            const uint32_t* line = foreground + ((row - sample.at.y) * sample.width + from);
            uint32_t loaded_pixel[kVectorPixels], pixel[kVectorPixels];
#pragma unroll
            for (int k = 0; k < kVectorPixels; ++k)
                loaded_pixel[k] = (uint32_t)(from + k) < (uint32_t)sample.width ? __ldg(line + k) : 0u;
#pragma unroll
            for (int k = 0; k < kVectorPixels; ++k)
                pixel[k] = flip ? loaded_pixel[kVectorPixels - 1 - k] : loaded_pixel[k];
            const uint32_t old[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
            uint32_t blended[4];
#if !defined(GPUFGBG_USER_BLEND)
            blend_vector(pixel, phase, old, blended);
#else
            blend_vector(pixel, phase, old, blended, sample, x, row);
#endif
            __stcs(composite + at, make_uint4(blended[0], blended[1], blended[2], blended[3]));
            if (part) count_vector(old, blended, phase, sums);
        }
        if (part) add_up(sums, part);
    }
}

// A band of a mask.
__device__ __forceinline__ void matte_vectors(const Assets& assets, const Sample& sample, int32_t top, int32_t bottom,
                                              uint4* matte) {
    const int32_t across = assets.width / kVector;
    const Window window = make_window(sample, top, bottom, 1, across);
    fill_around<false>(window, top, bottom, across, nullptr, matte);

    const uint8_t* mask = assets.masks + sample.offset;
    const int32_t count = window.rows * window.columns;
    if (count <= 0) return;
    const bool flip = sample.at.flip != 0;
    Walk walk(window.columns);
#pragma unroll 1
    for (int32_t i = (int32_t)threadIdx.x; i < count; i += kThreads) {
        const int32_t row = window.top + walk.row, column = window.left + walk.column;
        walk.advance();
        const int32_t x = column * kVector - sample.at.x, from = flip ? sample.width - kVector - x : x;
        const uint8_t* line = mask + ((row - sample.at.y) * sample.width + from);
        uint32_t value[kVector], word[4] = {}, turned[4];
#pragma unroll
        for (int k = 0; k < kVector; ++k)
            value[k] = (uint32_t)(from + k) < (uint32_t)sample.width ? __ldg(line + k) : 0u;
#pragma unroll
        for (int k = 0; k < kVector; ++k) word[k / 4] |= (uint32_t)blend_mask((uint8_t)value[k]) << 8 * (k % 4);
#pragma unroll
        for (int k = 0; k < 4; ++k) turned[k] = __byte_perm(flip ? word[3 - k] : word[k], 0u, flip ? 0x0123 : 0x3210);
        __stcs(matte + row * across + column, make_uint4(turned[0], turned[1], turned[2], turned[3]));
    }
}

// -------------------------------------------------------------------------------------------------------------------
// Pixels: any width, any alignment

__device__ __forceinline__ void render_pixels(const Assets& assets, const Sample& sample, int32_t top, int32_t bottom,
                                              const uint8_t* picture, uint8_t* composite, uint8_t* matte,
                                              long long* part) {
    const uint32_t* foreground = assets.foregrounds + sample.offset;
    const uint8_t* mask = assets.masks + sample.offset;
    const int32_t last = bottom * assets.width;
    Walk walk(assets.width);
    walk.row += top;
    for (int32_t start = top * assets.width; start < last; start += kCountedBytes * kThreads) {
        const int32_t end = least(last, start + kCountedBytes * kThreads);
        int32_t sums[kSums] = {};
#pragma unroll 1
        for (int32_t i = start + (int32_t)threadIdx.x; i < end; i += kThreads) {
            const int32_t x = walk.column - sample.at.x, y = walk.row - sample.at.y;
            walk.advance();
            const bool inside = (uint32_t)x < (uint32_t)sample.width && (uint32_t)y < (uint32_t)sample.height;
            const int32_t from = y * sample.width + (sample.at.flip ? sample.width - 1 - x : x);
            const uint32_t over = inside ? __ldg(foreground + from) : 0u;
            const uint32_t value = inside ? __ldg(mask + from) : 0u;
#pragma unroll
            for (int c = 0; c < 3; ++c) {
                const int32_t old = __ldg(picture + 3 * i + c);
#if !defined(GPUFGBG_USER_BLEND)
                const int32_t blended = blend((uint8_t)old, (uint8_t)(over >> 8 * c), (uint8_t)(over >> 24));
#else
                const int32_t colour = (int32_t)((over >> 8 * c) & 255u), alpha = (int32_t)(over >> 24);
                const int32_t blended =
                    inside ? gpufgbg_blend(colour, old, alpha, sample.at.x + x, sample.at.y + y) : old;
#endif
                composite[3 * i + c] = (uint8_t)blended;
                sums[c] += blended - old;
                sums[3 + c] += (blended - old) * (blended + old);
            }
            matte[i] = blend_mask((uint8_t)value);
        }
        if (part) add_up(sums, part);
    }
}

// -------------------------------------------------------------------------------------------------------------------
// Samples

// Placements by the generator, noted for the caller.
struct Planned {
    int32_t n_foregrounds, per_pair, flip_mode;
    uint64_t seed;
    const int64_t* indices;
    int64_t first;
    int32_t* placements;

    __device__ __forceinline__ Sample operator()(const Assets& assets, int64_t n) const {
        const uint64_t index = (uint64_t)(indices ? indices[n] : first + n);
        const uint64_t pair = (flip_mode == 2 ? index / 2u : index) / (uint32_t)per_pair;
        Sample sample;
        sample.at.background = (int32_t)(pair / (uint32_t)n_foregrounds);
        sample.at.foreground = (int32_t)(pair % (uint32_t)n_foregrounds);
        sample.at.flip = flip_mode == 2 ? index % 2u == 0u : flip_mode == 1;
        sample.width = assets.widths[sample.at.foreground];
        sample.height = assets.heights[sample.at.foreground];
        sample.offset = assets.offsets[sample.at.foreground];
        const Philox4x32 random = philox_sample(seed, index);
        sample.at.x = (int32_t)uniform_below(random.word[0], (uint32_t)(assets.width - sample.width + 1));
        sample.at.y = (int32_t)uniform_below(random.word[1], (uint32_t)(assets.height - sample.height + 1));
        if (placements && blockIdx.y == 0) {
            int32_t* to = placements + n * kPlacement;
            to[0] = sample.at.background, to[1] = sample.at.foreground, to[2] = sample.at.flip;
            to[3] = sample.at.x, to[4] = sample.at.y;
        }
        return sample;
    }
};

// Placements by the caller.
struct Placed {
    const int32_t* placements;

    __device__ __forceinline__ Sample operator()(const Assets& assets, int64_t n) const {
        const int32_t* at = placements + n * kPlacement;
        Sample sample;
        sample.at = {at[0], at[1], at[2], at[3], at[4]};
        sample.width = assets.widths[sample.at.foreground];
        sample.height = assets.heights[sample.at.foreground];
        sample.offset = assets.offsets[sample.at.foreground];
        return sample;
    }
};

template <class Place>
__device__ __forceinline__ void render(const Assets& assets, const Place& place, int32_t count, uint8_t* composites,
                                       uint8_t* mattes, unsigned long long* changes) {
    if (blockIdx.x >= (uint32_t)count) return;
    __shared__ Sample shared;
    __shared__ long long parts[kWarps][kSums];

    const int32_t rows = (assets.height + (int32_t)gridDim.y - 1) / (int32_t)gridDim.y;
    const int32_t top = least((int32_t)blockIdx.y * rows, assets.height), bottom = least(top + rows, assets.height);
    const int64_t pixels = (int64_t)assets.width * assets.height;
    const uintptr_t addresses = (uintptr_t)assets.backgrounds | (uintptr_t)composites | (uintptr_t)mattes;
    const bool vectors = (addresses | (uintptr_t)assets.width) % kVector == 0;
    long long* part = nullptr;  // of this warp; its first lane alone reads and writes it until the end
    if (changes) {
        part = parts[threadIdx.x / kWarp];
        if (threadIdx.x % kWarp == 0)
            for (int i = 0; i < kSums; ++i) part[i] = 0;
    }

    const int64_t n = blockIdx.x;
    if (threadIdx.x == 0) shared = place(assets, n);
    __syncthreads();
    const Sample sample = shared;
    const uint8_t* picture = assets.backgrounds + sample.at.background * pixels * 3;
    uint8_t* composite = composites + n * pixels * 3;
    uint8_t* matte = mattes + n * pixels;
    if (vectors) {
        composite_vectors(assets, sample, top, bottom, (const uint4*)picture, (uint4*)composite, part);
        matte_vectors(assets, sample, top, bottom, (uint4*)matte);
    } else {
        render_pixels(assets, sample, top, bottom, picture, composite, matte, part);
    }

    if (changes) {
        __syncthreads();
        if (threadIdx.x < kSums) {
            long long sum = 0;
            for (int warp = 0; warp < kWarps; ++warp) sum += parts[warp][threadIdx.x];
            if (sum) atomicAdd(changes + threadIdx.x, (unsigned long long)sum);
        }
    }
}

}  // namespace

// Samples by index. Block 256, grid (N, bands): a sample's rows are shared out to its blocks in equal bands. One band
// is best where N fills the card; more, up to the number of rows, where N is small and frames are large. Shared
// memory, static: 0.4 KB.
// backgrounds  (B, H, W, 3) uint8
// foregrounds  (P) RGBA pixels of 4 bytes, straight alpha, aligned to 4; foreground f's rows at offsets[f]
// masks        (P) uint8, laid out like foregrounds
// offsets      (F + 1) int64, in pixels
// widths, heights (F) int32: each fits the frame
// width, height: of the frame, W and H
// per_pair     repetitions of each (background, foreground, orientation)
// flip_mode    0: never, 1: always, 2: both, flipped first
// seed         the generator's key
// indices      (N) int64, in order of background, foreground, repetition, orientation; null: first, first + 1, ...
// n            N; blocks beyond have nothing to do
// out: composites (N, H, W, 3) uint8, mattes (N, H, W) uint8
//      placements (N, 5) int32: background, foreground, flip, x, y; or null
//      changes (6) uint64, added to modulo 2^64: of each channel, the batch's sum of (composite - background), then
//      of each, that of (composite^2 - background^2); or null
extern "C" __global__ void __launch_bounds__(kThreads, kResident)
    composite(const uint8_t* __restrict__ backgrounds, const uint32_t* __restrict__ foregrounds,
              const uint8_t* __restrict__ masks, const int64_t* __restrict__ offsets,
              const int32_t* __restrict__ widths, const int32_t* __restrict__ heights, int32_t width, int32_t height,
              int32_t n_foregrounds, int32_t per_pair, int32_t flip_mode, uint64_t seed,
              const int64_t* __restrict__ indices, int64_t first, int32_t n, uint8_t* __restrict__ composites,
              uint8_t* __restrict__ mattes, int32_t* __restrict__ placements, unsigned long long* changes) {
    const Assets assets = {backgrounds, foregrounds, masks, offsets, widths, heights, width, height};
    const Planned place = {n_foregrounds, per_pair, flip_mode, seed, indices, first, placements};
    render(assets, place, n, composites, mattes, changes);
}

// Samples by the caller's placements. Grid, block and pointers as for composite(), but
// placements   (N, 5) int32: background, foreground, flip, x, y; the foreground inside the frame
extern "C" __global__ void __launch_bounds__(kThreads, kResident)
    composite_placed(const uint8_t* __restrict__ backgrounds, const uint32_t* __restrict__ foregrounds,
                     const uint8_t* __restrict__ masks, const int64_t* __restrict__ offsets,
                     const int32_t* __restrict__ widths, const int32_t* __restrict__ heights, int32_t width,
                     int32_t height, const int32_t* __restrict__ placements, int32_t n,
                     uint8_t* __restrict__ composites, uint8_t* __restrict__ mattes, unsigned long long* changes) {
    const Assets assets = {backgrounds, foregrounds, masks, offsets, widths, heights, width, height};
    render(assets, Placed{placements}, n, composites, mattes, changes);
}
