// Exact sums and sums of squares of the bytes of pictures, of each channel.
//
// For pictures whose moments no other pass has, such as depth maps; composites are counted in composite.cu. Twin:
// moments() in gpufgbg/backends/cpu.py. Judge: gpufgbg.Moments, in tests/test_kernels_emulated.py.
//
// Each byte is read once, in aligned vectors of 16, four in flight a thread: reading is the limit. Of three channels,
// a vector begins with any one. The number of threads is a multiple of three, so all vectors of a thread begin with
// the same; it counts from that one on, with constant masks, and turns its sums into place at the end. Sums are byte
// dot products in 32 bits, moved to 64 before they can overflow.
#include <stdint.h>

namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int kThreads = 192;  // a multiple of a warp and of three
constexpr int kWarps = kThreads / kWarp;
constexpr int kUnroll = 4;   // loads in flight a thread
constexpr int kVector = 16;  // bytes

// Counts a vector. one, square (C): of its first channel, then the one after, ...
template <int C>
__device__ __forceinline__ void count_vector(const uint4& vector, uint32_t (&one)[C], uint32_t (&square)[C]) {
    const uint32_t word[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int c = 0; c < C; ++c) {
            // the bytes of word k of this channel: of three, a word moves on by one
            const int first = (c + 3 - k % 3) % 3;
            const uint32_t ones = C == 1 ? 0x01010101u : first == 0 ? 0x01000001u : first == 1 ? 0x0100u : 0x010000u;
            one[c] = __dp4a(word[k], ones, one[c]);
            square[c] = __dp4a(word[k], word[k] & (ones * 255u), square[c]);
        }
}

template <int C>
__device__ __forceinline__ void sum_pictures(const uint8_t* pictures, int64_t count, unsigned long long* sums) {
    // What a thread adds up in 32 bits: a vector has at most 16 bytes of one channel, 6 of three.
    constexpr int kMostSteps = (int)(0xFFFFFFFFu / (255u * 255u * (C == 1 ? 16u : 6u) * kUnroll));
    __shared__ unsigned long long parts[kWarps][2 * C];

    const int thread = (int)threadIdx.x;
    int64_t head = (int64_t)((0u - (uintptr_t)pictures) % kVector);  // bytes before the first vector
    if (head > count) head = count;
    const int64_t vectors = (count - head) / kVector;
    const uint4* from = (const uint4*)(pictures + head);
    const int64_t stride = (int64_t)gridDim.x * kThreads;
    int64_t at = (int64_t)blockIdx.x * kThreads + thread;
    const int phase = C == 1 ? 0 : (int)((head + at) % 3);  // channel of the first byte of its vectors

    uint64_t relative[2 * C] = {};
    while (at < vectors) {
        uint32_t one[C] = {}, square[C] = {};
        int step = 0;
        for (; step < kMostSteps && at + (kUnroll - 1) * stride < vectors; ++step, at += kUnroll * stride) {
            uint4 vector[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) vector[u] = __ldg(from + at + u * stride);
#pragma unroll
            for (int u = 0; u < kUnroll; ++u) count_vector<C>(vector[u], one, square);
        }
        for (; step < kMostSteps && at < vectors; ++step, at += stride)
            count_vector<C>(__ldg(from + at), one, square);
#pragma unroll
        for (int c = 0; c < C; ++c) relative[c] += one[c], relative[C + c] += square[c];
    }

    uint64_t own[2 * C];
#pragma unroll
    for (int i = 0; i < 2 * C; ++i) {
        const int base = i / C * C, c = i % C;
        own[i] = relative[i];
        if (C == 3 && phase == 1) own[i] = relative[base + (c + 2) % 3];
        if (C == 3 && phase == 2) own[i] = relative[base + (c + 1) % 3];
    }

    // The bytes before the first vector and after the last: fewer than 32, one a thread of the first block.
    const int64_t tail = head + vectors * kVector;
    const int64_t byte = thread < kVector ? (thread < head ? thread : count) : tail + thread - kVector;
    if (blockIdx.x == 0 && thread < 2 * kVector && byte < count) {
        const uint32_t value = __ldg(pictures + byte);
        const int channel = (int)(byte % C);
#pragma unroll
        for (int c = 0; c < C; ++c)
            if (c == channel) own[c] += value, own[C + c] += value * value;
    }

#pragma unroll
    for (int i = 0; i < 2 * C; ++i) {
#pragma unroll
        for (int step = kWarp / 2; step; step /= 2) own[i] += __shfl_xor_sync(kAllLanes, own[i], step);
        if (thread % kWarp == 0) parts[thread / kWarp][i] = own[i];
    }
    __syncthreads();
    if (thread < 2 * C) {
        unsigned long long sum = 0;
        for (int warp = 0; warp < kWarps; ++warp) sum += parts[warp][thread];
        if (sum) atomicAdd(sums + thread, sum);
    }
}

}  // namespace

// Block 192, grid any: as many blocks as are resident together, fewer where count is below 12,288 bytes a block.
// Shared memory, static: 0.4 KB.
// pictures     (count) uint8, channels interleaved, from the first on; any alignment
// count        bytes
// channels     1 or 3
// out: sums (2 * channels) uint64, added to: the sum of each channel, then the sum of squares of each
extern "C" __global__ void __launch_bounds__(kThreads)
    moments(const uint8_t* __restrict__ pictures, int64_t count, int32_t channels, unsigned long long* sums) {
    if (channels == 3)
        sum_pictures<3>(pictures, count, sums);
    else
        sum_pictures<1>(pictures, count, sums);
}
