// Baseline JPEG files for a whole batch of pictures, made in GPU memory, byte for byte Pillow's (libjpeg-turbo's); or
// only the pixels that it decodes from them.
//
// Algorithm: ITU-T T.81; every byte-deciding step is a function of jpeg.cuh, whose host build is judged by Pillow in
// tests/test_jpeg_host.py (one-threaded twin: tests/host/jpeg_host.cpp). One code path for all sizes.
//
// Launches for a batch of N pictures of one shape, on one stream:
//     jpeg_setup        once per (shape, subsampling, quality)      constants, fixed parts of the header
//     jpeg_transform_*  pixels -> tokens, a histogram per chunk     * = 444, 422, 420, grey
//     jpeg_tables       histograms -> book and header of each picture, where each chunk's bits start
//     jpeg_pack         tokens -> packed bytes, in place; counts of bytes
//     jpeg_sizes        counts -> where each chunk's bytes start in its file, file sizes
//     jpeg_offsets      file sizes -> offsets (N + 1)
//     jpeg_write        packed bytes -> files, one after the other, with stuffing
// or, for the pixels that a decoder gets from those files, without making them:
//     jpeg_setup          as above
//     jpeg_reconstruct_*  pixels -> planes of decoded samples       * = 444, 422, 420; grey gives the pixels at once
//     jpeg_upsample_*     planes -> decoded pixels                  * = 444, 422, 420
// offsets[N] is the room the files need; a caller that can't wait for it gives a buffer by guess: a file that does
// not fit whole is not written at all, the others are.
//
// Shape of the work. At quality 65 a natural 8x8 block has some fourteen coefficients that are not 0, and 70 bits. So
// the data shrinks at once: pixels (768 bytes an MCU) become *tokens*, one 32-bit word per Huffman symbol with its
// extra bits, about 15 a block, packed densely; coefficients never reach global memory. Traffic is then some 0.4 MB a
// 224x224 picture and no limit; issued instructions are. Hence one thread a block of 8x8: no idle lanes and no
// shuffles in the DCT, the row pass right after loading (eight samples in registers at a time), the column pass and
// the quantiser unrolled, the block between them in a column of shared memory (32 words of two coefficients, one bank
// a thread). A bit mask of the coefficients that are not 0 then leads each thread from one to the next.
//
// A picture is cut into *chunks* of consecutive MCUs, one thread block each, so small pictures fill the card together
// and large ones spread over it. Chunks of a picture depend on each other in three places, all settled in
// jpeg_tables: the first DC differences of a chunk (jpeg_transform leaves a note, `links`), the histograms' sum, and
// the bit at which a chunk begins: its first, incomplete byte takes the last bits of the chunk before (`leads`). From
// there each chunk makes whole bytes on its own.
//
// Scratch, for pictures of M MCUs of B blocks (B = 1 grey, 3 4:4:4, 4 4:2:2, 6 4:2:0), in chunks of K MCUs (K = 192
// grey, 64 4:4:4, 32 4:2:2 and 4:2:0), C = ceil(M / K) chunks, T table classes (1 grey, 2 colour):
//     setup        (4096) uint8                    tokens       (N, M * B * 64) uint32, 64 tokens a block at most
//     histograms   (N, C, T * 272) uint32          links        (N, C, channels) of 8 bytes
//     token_counts (N, C) uint32                   books        (N, T * 272) uint32
//     headers      (N, 640) uint8                  header_bytes (N) uint32
//     leads, chunk_bytes, chunk_sizes, chunk_starts (N, C) uint32; file_sizes (N) uint32; offsets (N + 1) int64
// To reconstruct colour pictures (grey ones need but the setup), with L = ceil(W / 8) * ceil(H / 8) luma blocks and
// Q = ceil(W / 8h) * ceil(H / 8v) blocks of each chroma component (h, v: 1, 1 for 4:4:4; 2, 1; 2, 2 for 4:2:0):
//     planes       (N, 64 * (L + 2 * Q)) uint8: Y, Cb, Cr, rows of whole blocks (jpeg.cuh, Plane)
// All of it is written before it is read; nothing needs clearing. Pointers must be aligned to 16 bytes, but for
// pixels and files. Pixels are read in aligned words of 4 bytes that hold at least one of their own bytes.
// Bounds: a token is at most 27 bits, a block 64 tokens, so a block at most 216 bytes, 432 with every byte stuffed; a
// file is at most 623 + 432 * M * B + 3 bytes (noise at quality 100 reaches about 100 a block). A picture's file must
// stay below 4 GB, N * C below 2^31.
#include "jpeg.cuh"

using namespace gpufgbg::jpeg;

namespace {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int kHeaderStride = 640;
static_assert(kHeaderStride >= kMaxHeader, "a header fits its row");

// What jpeg_setup prepares.
struct Setup {
    Divisor divisors[2 * kBlock];      // class, natural order
    uint32_t book[2 * kClassEntries];  // of the standard tables
    uint32_t prefix_bytes, tables_bytes, scan_bytes;
    uint8_t prefix[kMaxPrefix];    // SOI to SOF0
    uint8_t tables[kMaxTables];    // DHT of the standard tables
    uint8_t scan[kMaxScanHeader];  // SOS
};
static_assert(sizeof(Setup) <= 4096, "stated to callers");

// A chunk's first and last DC of a component and where its first DC token is.
struct Link {
    int16_t first, last;
    uint32_t token;
};
static_assert(sizeof(Link) == 8, "stated to callers");

// The lanes of jpeg.cuh's table functions: one warp.
struct Warp {
    static constexpr int kLanes = kWarp;
    __device__ int lane() const { return (int)(threadIdx.x % kWarp); }
    __device__ void sync() const { __syncwarp(); }
    __device__ uint32_t min(uint32_t v) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        return __reduce_min_sync(kAllLanes, v);
#else
        for (int step = kWarp / 2; step; step /= 2) {
            const uint32_t other = __shfl_xor_sync(kAllLanes, v, step);
            v = other < v ? other : v;
        }
        return v;
#endif
    }
    __device__ int32_t max(int32_t v) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        return __reduce_max_sync(kAllLanes, v);
#else
        for (int step = kWarp / 2; step; step /= 2) {
            const int32_t other = __shfl_xor_sync(kAllLanes, v, step);
            v = other > v ? other : v;
        }
        return v;
#endif
    }
    __device__ uint32_t ballot(bool v) const { return __ballot_sync(kAllLanes, v); }
    __device__ uint32_t alike(uint32_t v, bool among) const { return __match_any_sync(kAllLanes, among ? v : ~0u); }
};

__device__ __forceinline__ uint32_t warp_inclusive_scan(uint32_t v) {
    const int lane = (int)(threadIdx.x % kWarp);
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const uint32_t other = __shfl_up_sync(kAllLanes, v, step);
        if (lane >= step) v += other;
    }
    return v;
}

__device__ __forceinline__ uint32_t warp_sum(uint32_t v) {
#pragma unroll
    for (int step = kWarp / 2; step; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
    return v;
}

// Sum of v over the threads before this one, and over all. totals (Threads / 32), shared: not to be used again before
// the next __syncthreads().
template <int Threads>
__device__ __forceinline__ uint32_t exclusive_scan(uint32_t v, uint32_t* totals, uint32_t& sum) {
    const uint32_t inclusive = warp_inclusive_scan(v);
    const int warp = (int)(threadIdx.x / kWarp);
    if (threadIdx.x % kWarp == kWarp - 1) totals[warp] = inclusive;
    __syncthreads();
    uint32_t before = 0;
    sum = 0;
#pragma unroll
    for (int i = 0; i < Threads / kWarp; ++i) {
        const uint32_t total = totals[i];
        if (i < warp) before += total;
        sum += total;
    }
    return before + inclusive - v;
}

// -------------------------------------------------------------------------------------------------------------------
// Pixels

// Words of bytes from any address. aligned: the address suits the vector loads, 16 bytes where Words is a multiple of
// 4, else 8.
template <int Words>
__device__ __forceinline__ void load_words(const uint8_t* at, bool aligned, uint32_t (&word)[Words]) {
    if (aligned) {
        if constexpr (Words % 4 == 0) {
#pragma unroll
            for (int i = 0; i < Words / 4; ++i) {
                const uint4 four = ((const uint4*)at)[i];
                word[4 * i] = four.x, word[4 * i + 1] = four.y, word[4 * i + 2] = four.z, word[4 * i + 3] = four.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < Words / 2; ++i) {
                const uint2 two = ((const uint2*)at)[i];
                word[2 * i] = two.x, word[2 * i + 1] = two.y;
            }
        }
    } else {
        const int shift = 8 * (int)((uintptr_t)at & 3u);
        const uint32_t* from = (const uint32_t*)((uintptr_t)at & ~(uintptr_t)3u);
        uint32_t low = from[0];
#pragma unroll
        for (int i = 0; i < Words; ++i) {
            // the word after the last one has bytes of ours only where they are shifted
            const uint32_t high = from[i + 1 < Words || shift ? i + 1 : i];
            word[i] = __funnelshift_r(low, high, shift);
            low = high;
        }
    }
}

// The packed pixels in words of RGB bytes.
template <int Words>
__device__ __forceinline__ void unpack_pixels(const uint32_t (&word)[Words], uint32_t (&pixel)[Words / 3 * 4]) {
#pragma unroll
    for (int i = 0; i < Words / 3; ++i) {
        const uint32_t a = word[3 * i], b = word[3 * i + 1], c = word[3 * i + 2];
        pixel[4 * i] = a;
        pixel[4 * i + 1] = __funnelshift_r(a, b, 24);
        pixel[4 * i + 2] = __funnelshift_r(b, c, 16);
        pixel[4 * i + 3] = c >> 8;
    }
}

// Eight samples of one row of a component: component_sample() or grey_sample() from (x, y) on, x a multiple of 8,
// where all their pixels are inside the picture. H, V: pixels that make a sample, across and down.
template <int H, int V, int C>
__device__ __forceinline__ void load_samples(const uint8_t* image, int32_t width, int32_t height,
                                             const Conversion& to, bool aligned, int32_t x, int32_t y,
                                             int32_t (&sample)[kSide]) {
    const int32_t top = source_row(y, height, V);
    const uint8_t* row = image + ((int64_t)top * width + H * x) * C;
    if constexpr (C == 1) {
        uint32_t word[2];
        load_words(row, aligned, word);
#pragma unroll
        for (int i = 0; i < kSide; ++i) sample[i] = (int32_t)(word[i / 4] >> (8 * (i % 4)) & 255u);
    } else {
        uint32_t word[V][H * kSide / 4 * 3], sum[kSide] = {};
#pragma unroll
        for (int line = 0; line < V; ++line) {
            load_words(row, aligned, word[line]);
            if (top + 1 < height) row += 3 * width;
        }
#pragma unroll
        for (int line = 0; line < V; ++line) {
            uint32_t pixel[H * kSide];
            unpack_pixels(word[line], pixel);
#pragma unroll
            for (int i = 0; i < H * kSide; ++i) sum[i / H] += convert(pixel[i], to);
        }
#pragma unroll
        for (int i = 0; i < kSide; ++i)
            sample[i] = (int32_t)(H == 1 ? sum[i] : V == 1 ? mean2(sum[i], (uint32_t)i) : mean4(sum[i], (uint32_t)i));
    }
}

__device__ __forceinline__ uint32_t pack_pair(int32_t low, int32_t high) {
    return __byte_perm((uint32_t)low, (uint32_t)high, 0x5410);
}
__device__ __forceinline__ int32_t low_of_pair(uint32_t pair) { return (int16_t)(pair & 0xFFFFu); }
__device__ __forceinline__ int32_t high_of_pair(uint32_t pair) { return (int32_t)pair >> 16; }

// -------------------------------------------------------------------------------------------------------------------
// Pixels -> tokens

// H, V: luma blocks of an MCU, across and down; C: components.
template <int H, int V, int C>
struct Chunk {
    static constexpr int kLuma = H * V;
    static constexpr int kBlocks = kLuma + C - 1;
    static constexpr int kMcus = C == 1 ? 192 : kLuma == 1 ? 64 : 32;
    static constexpr int kThreads = kMcus * kBlocks;  // a multiple of a warp, and so is each component's part of it
    static constexpr int kResident = 5;  // blocks an SM at least: 64 registers a thread (4:2:2: up to 96)
};

// Of each thread's block: rows of pairs, later coefficients 2j and 2j + 1.
template <int Threads>
union Work {
    uint32_t pair[kBlock / 2][Threads];
    int16_t half[kBlock / 2][Threads][2];
};

// A block's samples through the row pass of the DCT, into the thread's column of work.
template <int H, int V, int C, int Threads>
__device__ __forceinline__ void load_rows(const uint8_t* pixels, int64_t image, int32_t width, int32_t height,
                                          int component, int32_t block_x, int32_t block_y, int thread,
                                          Work<Threads>& work) {
    const uint8_t* picture = pixels + image * width * height * C;
    const bool aligned = ((uintptr_t)pixels | (uintptr_t)((int64_t)width * C)) % 16 == 0;
    const Conversion to = conversion(component);
    const bool full = H * V == 1 || component == 0;  // a sample a pixel
    const int32_t x = block_x * kSide, y = block_y * kSide;
    const bool inside = (full ? 1 : H) * (x + kSide) <= width;
#pragma unroll 1
    for (int row = 0; row < kSide; ++row) {
        int32_t line[kSide];
        if (!inside) {
#pragma unroll 1
            for (int i = 0; i < kSide; ++i) {
                const uint32_t sample =
                    C == 1 ? grey_sample(picture, width, height, x + i, y + row)
                           : component_sample(picture, width, height, to, full ? 1 : H, full ? 1 : V, x + i, y + row);
                work.half[row * 4 + i / 2][thread][i % 2] = (int16_t)sample;
            }
#pragma unroll
            for (int i = 0; i < kSide; ++i) line[i] = work.half[row * 4 + i / 2][thread][i % 2];
        } else if (full) {
            load_samples<1, 1, C>(picture, width, height, to, aligned, x, y + row, line);
        } else {
            load_samples<H, V, C>(picture, width, height, to, aligned, x, y + row, line);
        }
        dct8<true>(line);
#pragma unroll
        for (int pair = 0; pair < kSide / 2; ++pair)
            work.pair[row * 4 + pair][thread] = pack_pair(line[2 * pair], line[2 * pair + 1]);
    }
}

// The two columns of a pair in work.
template <int Threads>
__device__ __forceinline__ void load_columns(const Work<Threads>& work, int thread, int pair, int32_t (&left)[kSide],
                                             int32_t (&right)[kSide]) {
#pragma unroll
    for (int row = 0; row < kSide; ++row) {
        left[row] = low_of_pair(work.pair[row * 4 + pair][thread]);
        right[row] = high_of_pair(work.pair[row * 4 + pair][thread]);
    }
}

// The column pass of the DCT on such a pair: coefficients times 8.
__device__ __forceinline__ void transform_columns(int pair, int32_t (&left)[kSide], int32_t (&right)[kSide]) {
    dct8<false>(left);
    dct8<false>(right);
    if (pair == 0) left[0] -= kDcShift;
}

// One thread a block of 8x8. Threads are in order of component, then block row of the MCU, then column of blocks, so
// that a warp has one component and its loads are next to each other; `slot` is a block's place in the scan.
template <int H, int V, int C>
__device__ __forceinline__ void transform(const uint8_t* __restrict__ pixels, int32_t width, int32_t height,
                                          const Setup* __restrict__ setup, uint32_t* __restrict__ tokens,
                                          uint32_t* __restrict__ histograms, Link* __restrict__ links,
                                          uint32_t* __restrict__ token_counts) {
    using Shape = Chunk<H, V, C>;
    constexpr int kThreads = Shape::kThreads, kBlocks = Shape::kBlocks, kLuma = Shape::kLuma, kMcus = Shape::kMcus;
    constexpr int kClasses = C == 1 ? 1 : 2, kEntries = kClasses * kClassEntries;

    __shared__ Work<kThreads> work;
    __shared__ uint32_t histogram[kEntries];
    __shared__ uint4 divisors[kClasses * kBlock / 2];  // of two neighbours
    __shared__ int32_t dc[kThreads];                   // by slot
    __shared__ uint32_t places[kThreads];              // by slot: how many tokens, then where they go
    __shared__ uint32_t totals[kThreads / kWarp];

    const int thread = (int)threadIdx.x;
    const int32_t across = ceil_div(width, kSide * H), mcus = across * ceil_div(height, kSide * V);
    const int32_t chunks = ceil_div(mcus, kMcus);
    const int64_t image = blockIdx.x / chunks;
    const int32_t first_mcu = (int32_t)(blockIdx.x % chunks) * kMcus;
    const int32_t chunk_mcus = least(kMcus, mcus - first_mcu);

#pragma unroll
    for (int i = 0; i < kEntries; i += kThreads)
        if (i + thread < kEntries) histogram[i + thread] = 0u;
    if (thread < kClasses * kBlock / 2) divisors[thread] = ((const uint4*)setup->divisors)[thread];

    int component, mcu_of_chunk, block_of_mcu, h = 0, v = 0;
    if (thread < kLuma * kMcus) {
        component = 0;
        v = thread / (H * kMcus);
        mcu_of_chunk = thread % (H * kMcus) / H;
        h = thread % H;
        block_of_mcu = v * H + h;
    } else {
        component = 1 + (thread - kLuma * kMcus) / kMcus;
        mcu_of_chunk = thread % kMcus;
        block_of_mcu = kLuma + component - 1;
    }
    const int slot = mcu_of_chunk * kBlocks + block_of_mcu;
    const bool present = mcu_of_chunk < chunk_mcus;
    const int32_t mcu_y = (first_mcu + mcu_of_chunk) / across, mcu_x = first_mcu + mcu_of_chunk - mcu_y * across;
    const int32_t block_x = component == 0 ? mcu_x * H + h : mcu_x, block_y = component == 0 ? mcu_y * V + v : mcu_y;
    const bool real = present && !(component == 0 && block_is_dummy(width, height, block_x, block_y));

    __syncthreads();
    uint32_t nonzero_low = 0u, nonzero_high = 0u;
    if (real) {
        load_rows<H, V, C>(pixels, image, width, height, component, block_x, block_y, thread, work);

        uint32_t packed[kBlock / 2];  // coefficients of columns 2p and 2p + 1 of a row
        const uint4* by = divisors + (component == 0 ? 0 : kBlock / 2);
#pragma unroll
        for (int pair = 0; pair < kSide / 2; ++pair) {
            int32_t left[kSide], right[kSide];
            load_columns(work, thread, pair, left, right);
            transform_columns(pair, left, right);
#pragma unroll
            for (int row = 0; row < kSide; ++row) {
                const uint4 divisor = by[row * 4 + pair];
                const Divisor left_by = {divisor.x, divisor.y}, right_by = {divisor.z, divisor.w};
                packed[row * 4 + pair] = pack_pair(quantise(left[row], left_by), quantise(right[row], right_by));
            }
        }

#pragma unroll
        for (int k = 0; k < kBlock; k += 2) {
            const int first = zigzag(k), second = zigzag(k + 1);
            const uint32_t two = __byte_perm(packed[first / 2], packed[second / 2],
                                             (first % 2 ? 0x32 : 0x10) | (second % 2 ? 0x7600 : 0x5400));
            uint32_t& nonzero = k < 32 ? nonzero_low : nonzero_high;
            if (two & 0xFFFFu) nonzero |= 1u << (k % 32);
            if (two >> 16) nonzero |= 2u << (k % 32);
            work.pair[k / 2][thread] = two;
        }

        // A dummy block after this one in the MCU repeats its DC.
        const int32_t level = low_of_pair(packed[0]);
        dc[slot] = level;
        if (H * V > 1 && component == 0)
            for (int next = block_of_mcu + 1; next < kLuma; ++next) {
                if (!block_is_dummy(width, height, mcu_x * H + next % H, mcu_y * V + next / H)) break;
                dc[slot + next - block_of_mcu] = level;
            }
    }
    places[slot] = present ? 1u + (uint32_t)count_ac_tokens(nonzero_low, nonzero_high) : 0u;

    __syncthreads();
    uint32_t total;
    places[thread] = exclusive_scan<kThreads>(places[thread], totals, total);
    __syncthreads();

    if (present) {
        const int table_class = component == 0 ? 0 : 1;
        const int64_t chunk_start = (image * mcus + first_mcu) * (int64_t)(kBlocks * kBlock);
        const uint32_t first_place = places[slot];
        uint32_t* to = tokens + chunk_start + first_place;
        const auto emit = [&](uint32_t entry, uint32_t extra) {
            ++to;
            to[-1] = make_token(entry, extra);
            atomicAdd(&histogram[entry], 1u);
        };
        const bool first_of_chunk = mcu_of_chunk == 0 && (component > 0 || block_of_mcu == 0);
        if (first_of_chunk) {
            const int last_block = component == 0 ? kLuma - 1 : block_of_mcu;
            const int32_t last = dc[(chunk_mcus - 1) * kBlocks + last_block];
            links[(int64_t)blockIdx.x * C + component] = {(int16_t)dc[slot], (int16_t)last, first_place};
        }
        if (first_of_chunk && first_mcu > 0) {
            ++to;  // jpeg_tables knows the DC before this one
        } else {
            // the block before of the same component: in this MCU, or the last one of the MCU before
            const int before = component > 0      ? slot - kBlocks
                               : block_of_mcu > 0 ? slot - 1
                                                  : slot - kBlocks + kLuma - 1;
            const uint32_t token = dc_token(table_class, dc[slot] - (first_of_chunk ? 0 : dc[before]));
            emit(token_entry(token), token >> 16);
        }
        const int16_t* own = work.half[0][thread];
        const auto value = [&](uint32_t k) { return (int32_t)own[k / 2u * (2 * kThreads) + k % 2u]; };
        tokenise_ac(table_class, nonzero_low, nonzero_high, value, emit);
    }

    __syncthreads();
#pragma unroll
    for (int i = 0; i < kEntries; i += kThreads)
        if (i + thread < kEntries) histograms[(int64_t)blockIdx.x * kEntries + i + thread] = histogram[i + thread];
    if (thread == 0) token_counts[blockIdx.x] = total;
}

}  // namespace

// Constants of a configuration. Grid 1, block 32.
// subsampling  0 4:4:4, 1 4:2:2, 2 4:2:0 (of a grey picture: only what its header says); quality 1..100
// out: setup (4096) uint8
extern "C" __global__ void __launch_bounds__(kWarp)
    jpeg_setup(int32_t width, int32_t height, int32_t channels, int32_t subsampling, int32_t quality,
               Setup* __restrict__ setup) {
    __shared__ HuffmanTable table;
    const Warp warp;
    const int classes = channels == 1 ? 1 : 2;
    for (int i = warp.lane(); i < classes * kBlock; i += kWarp)
        setup->divisors[i] = make_divisor(quantum(i / kBlock, i % kBlock, quality));
    for (int i = warp.lane(); i < classes * kClassEntries; i += kWarp) setup->book[i] = 0u;
    uint8_t* to = setup->tables;
    for (int i = 0; i < 2 * classes; ++i) {
        standard_table(warp, i / 2, i % 2, table);
        fill_book(warp, table, setup->book + i / 2 * kClassEntries + (i % 2 ? 0 : kDcEntry));
        write_table_segment(warp, to, i / 2, i % 2, table);
        to += table_segment_bytes(table);
        warp.sync();
    }
    if (warp.lane() == 0) {
        setup->tables_bytes = (uint32_t)(to - setup->tables);
        setup->prefix_bytes =
            (uint32_t)write_prefix(setup->prefix, make_frame(width, height, channels, subsampling), quality);
        setup->scan_bytes = (uint32_t)write_scan_header(setup->scan, channels);
    }
}

// Pixels to tokens. Grid N * C (chunk within picture fastest), block and chunk as in the file header: 444 192
// threads, 422 128, 420 192, grey 192. Shared memory, static: up to 30 KB.
//
// pixels       (N, H, W, 3) uint8; grey: (N, H, W) uint8
// setup        (4096) uint8 of the same shape, subsampling and quality
//
// out: tokens  (N, M * B * 64) uint32, chunk c's from c * K * B * 64 on
//      histograms (N, C, T * 272) uint32, without the DC tokens that depend on the chunk before
//      links (N, C, channels) Link; token_counts (N, C) uint32
extern "C" __global__ void __launch_bounds__(Chunk<1, 1, 3>::kThreads, Chunk<1, 1, 3>::kResident)
    jpeg_transform_444(const uint8_t* __restrict__ pixels, int32_t width, int32_t height,
                       const Setup* __restrict__ setup, uint32_t* __restrict__ tokens,
                       uint32_t* __restrict__ histograms, Link* __restrict__ links,
                       uint32_t* __restrict__ token_counts) {
    transform<1, 1, 3>(pixels, width, height, setup, tokens, histograms, links, token_counts);
}

extern "C" __global__ void __launch_bounds__(Chunk<2, 1, 3>::kThreads, Chunk<2, 1, 3>::kResident)
    jpeg_transform_422(const uint8_t* __restrict__ pixels, int32_t width, int32_t height,
                       const Setup* __restrict__ setup, uint32_t* __restrict__ tokens,
                       uint32_t* __restrict__ histograms, Link* __restrict__ links,
                       uint32_t* __restrict__ token_counts) {
    transform<2, 1, 3>(pixels, width, height, setup, tokens, histograms, links, token_counts);
}

extern "C" __global__ void __launch_bounds__(Chunk<2, 2, 3>::kThreads, Chunk<2, 2, 3>::kResident)
    jpeg_transform_420(const uint8_t* __restrict__ pixels, int32_t width, int32_t height,
                       const Setup* __restrict__ setup, uint32_t* __restrict__ tokens,
                       uint32_t* __restrict__ histograms, Link* __restrict__ links,
                       uint32_t* __restrict__ token_counts) {
    transform<2, 2, 3>(pixels, width, height, setup, tokens, histograms, links, token_counts);
}

extern "C" __global__ void __launch_bounds__(Chunk<1, 1, 1>::kThreads, Chunk<1, 1, 1>::kResident)
    jpeg_transform_grey(const uint8_t* __restrict__ pixels, int32_t width, int32_t height,
                        const Setup* __restrict__ setup, uint32_t* __restrict__ tokens,
                        uint32_t* __restrict__ histograms, Link* __restrict__ links,
                        uint32_t* __restrict__ token_counts) {
    transform<1, 1, 1>(pixels, width, height, setup, tokens, histograms, links, token_counts);
}

// -------------------------------------------------------------------------------------------------------------------
// Pixels -> the pixels that a decoder gets from the file

namespace {

constexpr int kReconstructThreads = 128;
constexpr int kUpsampleThreads = 128;

// One thread a block of 8x8, in order of component, then row, then column; dummy blocks are never seen. The block
// stays in the thread's column of shared memory: a pair of columns at a time goes through the rest of the DCT, the
// quantiser, and the column pass of the inverse, then a row at a time through the row pass.
template <int H, int V, int C>
__device__ __forceinline__ void reconstruct(const uint8_t* __restrict__ pixels, int32_t n, int32_t width,
                                            int32_t height, const Setup* __restrict__ setup,
                                            uint8_t* __restrict__ out) {
    constexpr int kThreads = kReconstructThreads, kClasses = C == 1 ? 1 : 2;
    __shared__ Work<kThreads> work;
    __shared__ uint4 divisors[kClasses * kBlock / 2];  // of two neighbours

    const int thread = (int)threadIdx.x;
    if (thread < kClasses * kBlock / 2) divisors[thread] = ((const uint4*)setup->divisors)[thread];
    __syncthreads();

    const int32_t luma_across = ceil_div(width, kSide), luma_blocks = luma_across * ceil_div(height, kSide);
    const int32_t chroma_across = ceil_div(width, kSide * H),
                  chroma_blocks = chroma_across * ceil_div(height, kSide * V);
    const int32_t image_blocks = luma_blocks + (C - 1) * chroma_blocks;
    const int64_t index = (int64_t)blockIdx.x * kThreads + thread, image = index / image_blocks;
    if (image >= n) return;
    int32_t block = (int32_t)(index - image * image_blocks), component = 0, across = luma_across;
    if (block >= luma_blocks) {
        component = 1 + (block - luma_blocks) / chroma_blocks;
        block = (block - luma_blocks) % chroma_blocks;
        across = chroma_across;
    }
    const int32_t block_y = block / across, block_x = block - block_y * across;
    load_rows<H, V, C>(pixels, image, width, height, component, block_x, block_y, thread, work);

    const uint4* by = divisors + (component == 0 ? 0 : kBlock / 2);
#pragma unroll 1
    for (int pair = 0; pair < kSide / 2; ++pair) {
        int32_t left[kSide], right[kSide];
        load_columns(work, thread, pair, left, right);
        transform_columns(pair, left, right);
#pragma unroll
        for (int row = 0; row < kSide; ++row) {
            const uint4 divisor = by[row * 4 + pair];
            const Divisor left_by = {divisor.x, divisor.y}, right_by = {divisor.z, divisor.w};
            left[row] = dequantise(quantise(left[row], left_by), left_by);
            right[row] = dequantise(quantise(right[row], right_by), right_by);
        }
        idct8<true>(left);
        idct8<true>(right);
#pragma unroll
        for (int row = 0; row < kSide; ++row) work.pair[row * 4 + pair][thread] = pack_pair(left[row], right[row]);
    }

    const int32_t x = block_x * kSide, y = block_y * kSide;
    const Plane plane = plane_of(component, width, height, H, V);
    const int32_t stride = C == 1 ? width : plane.stride;
    uint8_t* to =
        C == 1 ? out + image * width * height : out + image * all_planes_bytes(width, height, H, V) + plane.start;
    to += (int64_t)y * stride + x;
    // Planes have room for whole blocks, pictures don't.
    const int32_t rows = C == 1 ? least(kSide, height - y) : kSide, columns = C == 1 ? width - x : kSide;
    const bool whole = C > 1 || (columns >= kSide && ((uintptr_t)out | (uintptr_t)width) % 8 == 0);
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
        int32_t line[kSide];
#pragma unroll
        for (int pair = 0; pair < kSide / 2; ++pair) {
            line[2 * pair] = low_of_pair(work.pair[row * 4 + pair][thread]);
            line[2 * pair + 1] = high_of_pair(work.pair[row * 4 + pair][thread]);
        }
        idct8<false>(line);
        uint32_t word[2] = {};
#pragma unroll
        for (int i = 0; i < kSide; ++i) word[i / 4] |= limited(line[i]) << (8 * (i % 4));
        if (whole) {
            *(uint2*)to = {word[0], word[1]};
        } else {
#pragma unroll
            for (int i = 0; i < kSide; ++i)
                if (i < columns) to[i] = (uint8_t)(word[i / 4] >> (8 * (i % 4)));
        }
        to += stride;
    }
}

// One thread eight pixels of a row.
template <int H, int V>
__device__ __forceinline__ void upsample(const uint8_t* __restrict__ planes, int32_t n, int32_t width, int32_t height,
                                         uint8_t* __restrict__ out) {
    const int32_t across = ceil_div(width, kSide), groups = across * height;
    const int64_t index = (int64_t)blockIdx.x * kUpsampleThreads + (int)threadIdx.x, image = index / groups;
    if (image >= n) return;
    const int32_t group = (int32_t)(index - image * groups), y = group / across, x = (group - y * across) * kSide;

    const uint8_t* from = planes + image * all_planes_bytes(width, height, H, V);
    uint32_t luma[kSide], blue[kSide], red[kSide];
    upsample_eight<1, 1>(from, plane_of(0, width, height, H, V), x, y, luma);
    upsample_eight<H, V>(from, plane_of(1, width, height, H, V), x, y, blue);
    upsample_eight<H, V>(from, plane_of(2, width, height, H, V), x, y, red);
    uint32_t word[kSide / 4 * 3];
#pragma unroll
    for (int i = 0; i < kSide; i += 4) {
        uint32_t pixel[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) pixel[j] = to_rgb(luma[i + j], blue[i + j], red[i + j]);
        word[i / 4 * 3] = pixel[0] | pixel[1] << 24;
        word[i / 4 * 3 + 1] = pixel[1] >> 8 | pixel[2] << 16;
        word[i / 4 * 3 + 2] = pixel[2] >> 16 | pixel[3] << 8;
    }

    uint8_t* to = out + 3 * ((image * height + y) * width + x);
    const int32_t bytes = 3 * least(kSide, width - x);
    if (bytes == 3 * kSide && (uintptr_t)to % 8 == 0) {
#pragma unroll
        for (int i = 0; i < 3; ++i) ((uint2*)to)[i] = {word[2 * i], word[2 * i + 1]};
    } else {
#pragma unroll
        for (int i = 0; i < 3 * kSide; ++i)
            if (i < bytes) to[i] = (uint8_t)(word[i / 4] >> (8 * (i % 4)));
    }
}

}  // namespace

// Pixels to planes. Grid ceil(N * (L + 2 * Q) / 128), block 128. Shared memory, static: 17 KB.
// pixels       (N, H, W, 3) uint8
// n            pictures
// setup        (4096) uint8 of the same shape, subsampling and quality
// out: planes (N, 64 * (L + 2 * Q)) uint8
extern "C" __global__ void __launch_bounds__(kReconstructThreads)
    jpeg_reconstruct_444(const uint8_t* __restrict__ pixels, int32_t n, int32_t width, int32_t height,
                         const Setup* __restrict__ setup, uint8_t* __restrict__ planes) {
    reconstruct<1, 1, 3>(pixels, n, width, height, setup, planes);
}

extern "C" __global__ void __launch_bounds__(kReconstructThreads)
    jpeg_reconstruct_422(const uint8_t* __restrict__ pixels, int32_t n, int32_t width, int32_t height,
                         const Setup* __restrict__ setup, uint8_t* __restrict__ planes) {
    reconstruct<2, 1, 3>(pixels, n, width, height, setup, planes);
}

extern "C" __global__ void __launch_bounds__(kReconstructThreads)
    jpeg_reconstruct_420(const uint8_t* __restrict__ pixels, int32_t n, int32_t width, int32_t height,
                         const Setup* __restrict__ setup, uint8_t* __restrict__ planes) {
    reconstruct<2, 2, 3>(pixels, n, width, height, setup, planes);
}

// The same for grey pictures, straight to pixels. Grid ceil(N * L / 128), block 128.
// pixels       (N, H, W) uint8
// out: out (N, H, W) uint8, not the pixels' own memory
extern "C" __global__ void __launch_bounds__(kReconstructThreads)
    jpeg_reconstruct_grey(const uint8_t* __restrict__ pixels, int32_t n, int32_t width, int32_t height,
                          const Setup* __restrict__ setup, uint8_t* __restrict__ out) {
    reconstruct<1, 1, 1>(pixels, n, width, height, setup, out);
}

// Planes to pixels. Grid ceil(N * H * ceil(W / 8) / 128), block 128.
// planes       (N, 64 * (L + 2 * Q)) uint8
// out: out (N, H, W, 3) uint8
extern "C" __global__ void __launch_bounds__(kUpsampleThreads)
    jpeg_upsample_444(const uint8_t* __restrict__ planes, int32_t n, int32_t width, int32_t height,
                      uint8_t* __restrict__ out) {
    upsample<1, 1>(planes, n, width, height, out);
}

extern "C" __global__ void __launch_bounds__(kUpsampleThreads)
    jpeg_upsample_422(const uint8_t* __restrict__ planes, int32_t n, int32_t width, int32_t height,
                      uint8_t* __restrict__ out) {
    upsample<2, 1>(planes, n, width, height, out);
}

extern "C" __global__ void __launch_bounds__(kUpsampleThreads)
    jpeg_upsample_420(const uint8_t* __restrict__ planes, int32_t n, int32_t width, int32_t height,
                      uint8_t* __restrict__ out) {
    upsample<2, 2>(planes, n, width, height, out);
}

// -------------------------------------------------------------------------------------------------------------------
// Histograms -> tables, headers, bit positions

// Grid N, block 64 (grey) or 128: one warp a table, in the order of the DHT segments. Shared memory, static: 16 KB.
// optimize     0: the standard tables; 1: each picture's own
// image_blocks M * B; chunk_blocks K * B
// links        (N, C, channels) Link; token_counts (N, C) uint32
//
// in and out: tokens (N, M * B * 64) uint32, histograms (N, C, T * 272) uint32: a chunk's first DC tokens are added
//
// out: books (N, T * 272) uint32
//      headers (N, 640) uint8, header_bytes (N) uint32
//      leads (N, C) uint32: bits 0..2 how many bits of a byte were begun before the chunk, bits 8..14 those bits
extern "C" __global__ void __launch_bounds__(4 * kWarp)
    jpeg_tables(const Setup* __restrict__ setup, int32_t channels, int32_t optimize, int32_t chunks,
                int32_t image_blocks, int32_t chunk_blocks, const Link* __restrict__ links,
                const uint32_t* __restrict__ token_counts, uint32_t* tokens, uint32_t* histograms,
                uint32_t* __restrict__ books, uint8_t* __restrict__ headers, uint32_t* __restrict__ header_bytes,
                uint32_t* leads) {
    __shared__ uint32_t histogram[2 * kClassEntries];
    __shared__ uint32_t book[2 * kClassEntries];
    __shared__ HuffmanScratch scratch[4];
    __shared__ HuffmanTable tables[4];

    const int thread = (int)threadIdx.x, threads = (int)blockDim.x, warps = threads / kWarp;
    const int warp_index = thread / kWarp;
    const Warp warp;
    const int lane = warp.lane();
    const int entries = (channels == 1 ? 1 : 2) * kClassEntries;
    const int64_t image = blockIdx.x;
    uint32_t* image_tokens = tokens + image * image_blocks * kBlock;
    uint32_t* image_histograms = histograms + image * chunks * entries;
    const int64_t chunk_tokens = (int64_t)chunk_blocks * kBlock;

    // DC differences across chunks.
    for (int i = thread; i < (chunks - 1) * channels; i += threads) {
        const int chunk = 1 + i / channels, component = i % channels;
        const Link here = links[(image * chunks + chunk) * channels + component];
        const Link before = links[(image * chunks + chunk - 1) * channels + component];
        const uint32_t token = dc_token(component == 0 ? 0 : 1, here.first - before.last);
        image_tokens[chunk * chunk_tokens + here.token] = token;
        atomicAdd(&image_histograms[(int64_t)chunk * entries + token_entry(token)], 1u);
    }
    __syncthreads();

    uint8_t* header = headers + image * kHeaderStride;
    const uint32_t prefix_bytes = setup->prefix_bytes, scan_bytes = setup->scan_bytes;
    uint32_t tables_bytes = 0u;
    for (uint32_t i = thread; i < prefix_bytes; i += threads) header[i] = setup->prefix[i];
    if (optimize) {
        for (int i = thread; i < entries; i += threads) {
            uint32_t sum = 0u;
            for (int chunk = 0; chunk < chunks; ++chunk) sum += image_histograms[(int64_t)chunk * entries + i];
            histogram[i] = sum;
            book[i] = 0u;
        }
        __syncthreads();
        const int table_class = warp_index / 2, kind = warp_index % 2;
        const int first = table_class * kClassEntries + (kind ? 0 : kDcEntry);
        optimal_table(warp, histogram + first, kind ? kDcEntry : kClassEntries - kDcEntry, scratch[warp_index],
                      tables[warp_index]);
        fill_book(warp, tables[warp_index], book + first);
        __syncthreads();
        uint32_t before = 0u;
        for (int i = 0; i < warps; ++i) {
            if (i == warp_index) before = tables_bytes;
            tables_bytes += (uint32_t)table_segment_bytes(tables[i]);
        }
        write_table_segment(warp, header + prefix_bytes + before, table_class, kind, tables[warp_index]);
    } else {
        tables_bytes = setup->tables_bytes;
        for (uint32_t i = thread; i < tables_bytes; i += threads) header[prefix_bytes + i] = setup->tables[i];
        for (int i = thread; i < entries; i += threads) book[i] = setup->book[i];
        __syncthreads();
    }
    for (uint32_t i = thread; i < scan_bytes; i += threads) header[prefix_bytes + tables_bytes + i] = setup->scan[i];
    if (thread == 0) header_bytes[image] = prefix_bytes + tables_bytes + scan_bytes;
    for (int i = thread; i < entries; i += threads) books[image * entries + i] = book[i];

    // Bits of each chunk, then their sum over the chunks before (modulo 2^32: only its last three bits matter).
    uint32_t* image_leads = leads + image * chunks;
    for (int chunk = warp_index; chunk < chunks; chunk += warps) {
        uint32_t bits = 0u;
        for (int i = lane; i < entries; i += kWarp)
            bits += image_histograms[(int64_t)chunk * entries + i] * book_length(book[i]);
        bits = warp_sum(bits);
        if (lane == 0) image_leads[chunk] = bits;
    }
    __syncthreads();
    if (warp_index > 0) return;
    uint32_t carry = 0u;
    for (int first = 0; first < chunks; first += kWarp) {
        const int chunk = first + lane;
        const uint32_t bits = chunk < chunks ? image_leads[chunk] : 0u;
        const uint32_t inclusive = warp_inclusive_scan(bits);
        if (chunk < chunks) {
            // The incomplete byte's bits are the last ones of the chunk before, whose tokens are read from behind.
            const int missing = (int)((carry + inclusive - bits) & 7u);
            uint64_t last_bits = 0u;
            if (missing) {
                const uint32_t* token =
                    image_tokens + (chunk - 1) * chunk_tokens + token_counts[image * chunks + chunk - 1];
                for (int have = 0; have < missing;) {
                    const uint32_t entry = book[token_entry(*--token)];
                    last_bits |= (uint64_t)token_bits(entry, *token) << have;
                    have += (int)book_length(entry);
                }
            }
            const uint32_t kept = (uint32_t)last_bits & ((1u << missing) - 1u);
            image_leads[chunk] = (uint32_t)missing | kept << 8;
        }
        carry += __shfl_sync(kAllLanes, inclusive, kWarp - 1);
    }
}

// -------------------------------------------------------------------------------------------------------------------
// Tokens -> bytes

namespace {
constexpr int kPackThreads = 128;
constexpr int kRoundTokens = 4 * kPackThreads;
constexpr int kRoundWords = (kRoundTokens * 27 + 31) / 32 + 1;
}  // namespace

// Grid N * C, block 128. Shared memory, static: 4 KB.
// A thread joins four tokens at a time; all of a round are put into place in shared memory, and the words that are
// complete leave for global memory, over the tokens of this round and those before (27 bits a token: they never run
// ahead). Bytes that end in the chunk are the chunk's; the picture's last one is filled with ones.
// books (N, T * 272) uint32; token_counts, leads (N, C) uint32
// in and out: tokens (N, M * B * 64) uint32 -> the packed bytes of chunk c from word c * K * B * 64 on
// out: chunk_bytes (N, C) uint32, bytes so packed; chunk_sizes (N, C) uint32, the same with stuffing
extern "C" __global__ void __launch_bounds__(kPackThreads)
    jpeg_pack(int32_t channels, int32_t chunks, int32_t image_blocks, int32_t chunk_blocks,
              const uint32_t* __restrict__ books, const uint32_t* __restrict__ token_counts,
              const uint32_t* __restrict__ leads, uint32_t* tokens, uint32_t* __restrict__ chunk_bytes,
              uint32_t* __restrict__ chunk_sizes) {
    __shared__ uint32_t book[2 * kClassEntries];
    __shared__ uint32_t words[kRoundWords];
    __shared__ uint32_t totals[kPackThreads / kWarp];

    const int thread = (int)threadIdx.x;
    const int64_t image = blockIdx.x / chunks;
    const int32_t chunk = (int32_t)(blockIdx.x % chunks);
    const int entries = (channels == 1 ? 1 : 2) * kClassEntries;
    uint32_t* chunk_tokens = tokens + (image * image_blocks + (int64_t)chunk * chunk_blocks) * kBlock;
    const uint32_t count = token_counts[blockIdx.x], lead = leads[blockIdx.x];
    for (int i = thread; i < entries; i += kPackThreads) book[i] = books[image * entries + i];
    for (int i = thread; i < kRoundWords; i += kPackThreads) words[i] = 0u;

    uint32_t pending = lead & 7u;                                       // bits in words[0]
    uint32_t tail = (uint32_t)((uint64_t)lead >> 8 << (32 - pending));  // words[0], bits from the top
    uint32_t written = 0u, ones = 0u;
    __syncthreads();
    if (thread == 0) words[0] = tail;
    for (uint32_t first = 0; first < count; first += kRoundTokens) {
        const uint32_t at = first + 4u * (uint32_t)thread;
        uint32_t token[4] = {0u, 0u, 0u, 0u}, entry[4] = {0u, 0u, 0u, 0u};
        if (at + 3u < count) {
            const uint4 four = *(const uint4*)(chunk_tokens + at);
            token[0] = four.x, token[1] = four.y, token[2] = four.z, token[3] = four.w;
#pragma unroll
            for (int i = 0; i < 4; ++i) entry[i] = book[token_entry(token[i])];
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (at + (uint32_t)i < count) {
                    token[i] = chunk_tokens[at + i];
                    entry[i] = book[token_entry(token[i])];
                }
        }
        uint32_t length = 0u, sum;
#pragma unroll
        for (int i = 0; i < 4; ++i) length += book_length(entry[i]);
        const uint32_t position = pending + exclusive_scan<kPackThreads>(length, totals, sum);

        if (length) {
            uint32_t* word = words + position / 32u;
            uint32_t used = position % 32u;
            uint64_t bits = 0u;  // from the top
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                used += book_length(entry[i]);
                bits |= (uint64_t)token_bits(entry[i], token[i]) << ((64u - used) & 63u);
                if (used >= 32u) {
                    atomicOr(word++, (uint32_t)(bits >> 32));
                    bits <<= 32;
                    used -= 32u;
                }
            }
            if (used) atomicOr(word, (uint32_t)(bits >> 32));
        }
        __syncthreads();

        pending += sum;
        const uint32_t complete = pending / 32u;
        pending %= 32u;
        for (uint32_t i = thread; i < complete; i += kPackThreads) {
            const uint32_t word = words[i];
            words[i] = 0u;
            ones += (uint32_t)count_bits(bytes_of_ones(word));
            chunk_tokens[written + i] = swap_bytes(word);
        }
        written += complete;
        tail = words[complete];
        __syncthreads();
        if (thread == 0) {
            words[complete] = 0u;
            words[0] = tail;
        }
    }

    uint32_t tail_bytes = pending / 8u;
    if (chunk == chunks - 1 && pending % 8u) {
        tail |= 0xFFFFFFFFu >> pending;
        ++tail_bytes;
    }
    if (thread == 0 && tail_bytes) {
        ones += (uint32_t)count_bits(bytes_of_ones(tail & ~(uint32_t)(0xFFFFFFFFull >> (8u * tail_bytes))));
        chunk_tokens[written] = swap_bytes(tail);
    }
    exclusive_scan<kPackThreads>(ones, totals, ones);
    if (thread == 0) {
        chunk_bytes[blockIdx.x] = 4u * written + tail_bytes;
        chunk_sizes[blockIdx.x] = 4u * written + tail_bytes + ones;
    }
}

// Grid ceil(N / 4), block 128: one warp a picture.
// n            pictures; header_bytes (N) uint32; chunk_sizes (N, C) uint32
// out: chunk_starts (N, C) uint32, from the start of the file; file_sizes (N) uint32
extern "C" __global__ void __launch_bounds__(128)
    jpeg_sizes(int32_t n, int32_t chunks, const uint32_t* __restrict__ header_bytes,
               const uint32_t* __restrict__ chunk_sizes, uint32_t* __restrict__ chunk_starts,
               uint32_t* __restrict__ file_sizes) {
    const int64_t image = (int64_t)blockIdx.x * (blockDim.x / kWarp) + threadIdx.x / kWarp;
    if (image >= n) return;
    const int lane = (int)(threadIdx.x % kWarp);
    uint32_t carry = header_bytes[image];
    for (int first = 0; first < chunks; first += kWarp) {
        const int chunk = first + lane;
        const uint32_t size = chunk < chunks ? chunk_sizes[image * chunks + chunk] : 0u;
        const uint32_t inclusive = warp_inclusive_scan(size);
        if (chunk < chunks) chunk_starts[image * chunks + chunk] = carry + inclusive - size;
        carry += __shfl_sync(kAllLanes, inclusive, kWarp - 1);
    }
    if (lane == 0) file_sizes[image] = carry + 2u;  // EOI
}

// Grid 1, block 1024.
// file_sizes (N) uint32
// out: offsets (N + 1) int64
extern "C" __global__ void __launch_bounds__(1024)
    jpeg_offsets(int32_t n, const uint32_t* __restrict__ file_sizes, int64_t* __restrict__ offsets) {
    constexpr int kThreads = 1024;
    __shared__ int64_t totals[kThreads / kWarp];
    const int thread = (int)threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
    int64_t carry = 0;
    for (int32_t first = 0; first < n; first += kThreads) {
        const int32_t image = first + thread;
        const int64_t size = image < n ? (int64_t)file_sizes[image] : 0;
        int64_t inclusive = size;
#pragma unroll
        for (int step = 1; step < kWarp; step *= 2) {
            const int64_t other = __shfl_up_sync(kAllLanes, inclusive, step);
            if (lane >= step) inclusive += other;
        }
        if (lane == kWarp - 1) totals[warp] = inclusive;
        __syncthreads();
        int64_t before = carry;
        for (int i = 0; i < kThreads / kWarp; ++i) {
            if (i < warp) before += totals[i];
            carry += totals[i];
        }
        if (image < n) offsets[image] = before + inclusive - size;
        __syncthreads();
    }
    if (thread == 0) offsets[n] = carry;
}

// Grid N * C, block 128. Shared memory, static: 16 bytes.
// headers (N, 640) uint8; header_bytes (N) uint32; packed: what jpeg_pack left in tokens
// chunk_bytes, chunk_starts (N, C) uint32; offsets (N + 1) int64
// capacity     of files, in bytes; a file that would end beyond it is left out
// out: files (offsets[N]) uint8
extern "C" __global__ void __launch_bounds__(128)
    jpeg_write(int32_t chunks, int32_t image_blocks, int32_t chunk_blocks, const uint8_t* __restrict__ headers,
               const uint32_t* __restrict__ header_bytes, const uint32_t* __restrict__ packed,
               const uint32_t* __restrict__ chunk_bytes, const uint32_t* __restrict__ chunk_starts,
               const int64_t* __restrict__ offsets, int64_t capacity, uint8_t* __restrict__ files) {
    constexpr int kThreads = 128;
    __shared__ uint32_t totals[kThreads / kWarp];
    const int thread = (int)threadIdx.x;
    const int64_t image = blockIdx.x / chunks;
    const int32_t chunk = (int32_t)(blockIdx.x % chunks);
    const int64_t end = offsets[image + 1];
    if (end > capacity) return;
    uint8_t* file = files + offsets[image];
    if (chunk == 0) {
        const uint32_t count = header_bytes[image];
        for (uint32_t i = thread; i < count; i += kThreads) file[i] = headers[image * kHeaderStride + i];
    }
    if (chunk == chunks - 1 && thread < 2) files[end - 2 + thread] = thread ? 0xD9 : 0xFF;

    const uint32_t* from = packed + (image * image_blocks + (int64_t)chunk * chunk_blocks) * kBlock;
    const uint32_t bytes = chunk_bytes[blockIdx.x];
    uint8_t* to = file + chunk_starts[blockIdx.x];
    for (uint32_t first = 0; first < bytes; first += 4u * kThreads) {
        const uint32_t at = first + 4u * (uint32_t)thread;
        const uint32_t valid = at >= bytes ? 0u : bytes - at < 4u ? bytes - at : 4u;
        const uint32_t word = valid ? from[at / 4u] : 0u;
        const uint32_t stuffed = bytes_of_ones(word) & (uint32_t)((1ull << (8u * valid)) - 1ull);
        uint32_t sum;
        uint8_t* place = to + exclusive_scan<kThreads>(valid + (uint32_t)count_bits(stuffed), totals, sum);
#pragma unroll
        for (uint32_t i = 0; i < 4u; ++i)
            if (i < valid) {
                *place++ = (uint8_t)(word >> (8u * i));
                if (stuffed >> (8u * i + 7u) & 1u) *place++ = 0u;
            }
        to += sum;
        __syncthreads();
    }
}
