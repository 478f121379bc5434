// The kernel files themselves on the CPU, one launcher each, for tests/test_kernels_emulated.py.
#include "cuda_emulator.h"
// After the emulator, so that the headers take their branches for devices; before the kernels, so that they are in
// none of their namespaces.
#include "../../kernels/blend.cuh"
#include "../../kernels/jpeg.cuh"
#include "../../kernels/philox.cuh"

// A namespace each: their files are modules of their own on the GPU, and use the same names.
namespace composite_cu {
#define EMULATED_KERNEL "../../kernels/composite.cu"
#include "cuda_emulator.h"
}  // namespace composite_cu
namespace moments_cu {
#define EMULATED_KERNEL "../../kernels/moments.cu"
#include "cuda_emulator.h"
}  // namespace moments_cu
namespace jpeg_cu {
#define EMULATED_KERNEL "../../kernels/jpeg.cu"
#include "cuda_emulator.h"
}  // namespace jpeg_cu

namespace {

// Memory of a kernel, aligned as the GPU's allocations are: full of what no kernel may rely on, between bytes that it
// must not touch.
template <class T>
class Guarded {
 public:
    Guarded(const char* name, size_t count) : name_(name), bytes_(count * sizeof(T)), memory_(bytes_ + 3 * kGuard) {
        start_ = (uint8_t*)(((uintptr_t)memory_.data() + 2 * kGuard - 1) / kGuard * kGuard);
        for (size_t i = 0; i < bytes_; ++i) start_[i] = (uint8_t)(emulator::random_order() >> 24);
        for (size_t i = 0; i < kGuard; ++i) start_[-1 - (ptrdiff_t)i] = start_[bytes_ + i] = 0xA5;
    }
    ~Guarded() {
        for (size_t i = 0; i < kGuard; ++i)
            if (start_[-1 - (ptrdiff_t)i] != 0xA5 || start_[bytes_ + i] != 0xA5) {
                fprintf(stderr, "%s: written out of bounds\n", name_);
                abort();
            }
    }
    operator T*() { return (T*)start_; }

 private:
    static constexpr size_t kGuard = 256;
    const char* name_;
    size_t bytes_;
    std::vector<uint8_t> memory_;
    uint8_t* start_;
};

}  // namespace

extern "C" {

// The order of threads and blocks of the launches that follow.
void reorder(uint32_t seed) { emulator::random_order.seed(seed); }

void run_composite(int32_t blocks, int32_t bands, const uint8_t* backgrounds, const uint32_t* foregrounds,
                   const uint8_t* masks, const int64_t* offsets, const int32_t* widths, const int32_t* heights,
                   int32_t width, int32_t height, int32_t n_foregrounds, int32_t per_pair, int32_t flip_mode,
                   uint64_t seed, const int64_t* indices, int64_t first, int32_t n, uint8_t* composites,
                   uint8_t* mattes, int32_t* placements, unsigned long long* changes) {
    emulator::launch(blocks, bands, composite_cu::kThreads, [=] {
        composite_cu::composite(backgrounds, foregrounds, masks, offsets, widths, heights, width, height,
                                n_foregrounds, per_pair, flip_mode, seed, indices, first, n, composites, mattes,
                                placements, changes);
    });
}

void run_composite_placed(int32_t blocks, int32_t bands, const uint8_t* backgrounds, const uint32_t* foregrounds,
                          const uint8_t* masks, const int64_t* offsets, const int32_t* widths, const int32_t* heights,
                          int32_t width, int32_t height, const int32_t* placements, int32_t n, uint8_t* composites,
                          uint8_t* mattes, unsigned long long* changes) {
    emulator::launch(blocks, bands, composite_cu::kThreads, [=] {
        composite_cu::composite_placed(backgrounds, foregrounds, masks, offsets, widths, heights, width, height,
                                       placements, n, composites, mattes, changes);
    });
}

#if !defined(GPUFGBG_USER_BLEND)
// out (256, 256) uint8, rows by background, columns by foreground: four bytes at a time, in all four lanes
void blend_all_by_four(int32_t alpha, uint8_t* out) {
    for (uint32_t background = 0; background < 256; ++background)
        for (uint32_t foreground = 0; foreground < 256; ++foreground) {
            // the other lanes hold other values, so that one that spills over shows
            const uint32_t lane = (background + foreground) % 4, others = 255u * (foreground % 2);
            const auto word = [=](uint32_t byte) {
                return (0x01010101u * others & ~(255u << 8 * lane)) | byte << 8 * lane;
            };
            const uint32_t blended =
                composite_cu::blend_four(word(background), word(foreground), word((uint32_t)alpha));
            out[256 * background + foreground] = (uint8_t)(blended >> 8 * lane);
        }
}
#endif

void run_moments(int32_t blocks, const uint8_t* pictures, int64_t count, int32_t channels, unsigned long long* sums) {
    emulator::launch(blocks, 1, moments_cu::kThreads, [=] { moments_cu::moments(pictures, count, channels, sums); });
}

// All launches of a batch, as the header of jpeg.cu tells: pixels (n, height, width, channels) -> files (capacity)
// and offsets_out (n + 1). misalign: bytes by which the kernels' pixels are off an aligned address, below 16.
void run_jpeg(const uint8_t* pixels, int32_t n, int32_t width, int32_t height, int32_t channels, int32_t subsampling,
              int32_t quality, int32_t optimize, int32_t misalign, int64_t capacity, uint8_t* files_out,
              int64_t* offsets_out) {
    using namespace gpufgbg::jpeg;
    const Frame frame = make_frame(width, height, channels, subsampling);
    const bool grey = channels == 1;
    const int32_t mcu_blocks = blocks_per_mcu(frame), mcus = mcus_across(frame) * mcus_down(frame);
    const int32_t chunk_mcus = grey ? 192 : subsampling == 0 ? 64 : 32, chunks = ceil_div(mcus, chunk_mcus);
    const int32_t image_blocks = mcus * mcu_blocks, chunk_blocks = chunk_mcus * mcu_blocks;
    const int32_t classes = grey ? 1 : 2;
    const size_t all_chunks = (size_t)n * chunks, pixel_bytes = (size_t)n * width * height * channels;

    Guarded<uint8_t> memory("pixels", pixel_bytes + 16), headers("headers", (size_t)n * 640);
    Guarded<uint8_t> setup_memory("setup", 4096), files("files", (size_t)capacity);
    Guarded<uint32_t> tokens("tokens", (size_t)n * image_blocks * 64), books("books", (size_t)n * classes * 272);
    Guarded<uint32_t> histograms("histograms", all_chunks * classes * 272), counts("token_counts", all_chunks);
    Guarded<uint32_t> leads("leads", all_chunks), chunk_bytes("chunk_bytes", all_chunks);
    Guarded<uint32_t> chunk_sizes("chunk_sizes", all_chunks), chunk_starts("chunk_starts", all_chunks);
    Guarded<uint32_t> header_bytes("header_bytes", n), file_sizes("file_sizes", n);
    Guarded<jpeg_cu::Link> links("links", all_chunks * channels);
    Guarded<int64_t> offsets("offsets", (size_t)n + 1);
    jpeg_cu::Setup* setup = (jpeg_cu::Setup*)(uint8_t*)setup_memory;
    uint8_t* from = memory + misalign;
    std::copy(pixels, pixels + pixel_bytes, from);

    const auto transform = grey               ? jpeg_cu::jpeg_transform_grey
                           : subsampling == 0 ? jpeg_cu::jpeg_transform_444
                           : subsampling == 1 ? jpeg_cu::jpeg_transform_422
                                              : jpeg_cu::jpeg_transform_420;
    const unsigned grid = (unsigned)all_chunks;
    emulator::launch(1, 1, 32, [&] { jpeg_cu::jpeg_setup(width, height, channels, subsampling, quality, setup); });
    emulator::launch(grid, 1, chunk_blocks,
                     [&] { transform(from, width, height, setup, tokens, histograms, links, counts); });
    emulator::launch(n, 1, classes * 64, [&] {
        jpeg_cu::jpeg_tables(setup, channels, optimize, chunks, image_blocks, chunk_blocks, links, counts, tokens,
                             histograms, books, headers, header_bytes, leads);
    });
    emulator::launch(grid, 1, 128, [&] {
        jpeg_cu::jpeg_pack(channels, chunks, image_blocks, chunk_blocks, books, counts, leads, tokens, chunk_bytes,
                           chunk_sizes);
    });
    emulator::launch((n + 3) / 4, 1, 128,
                     [&] { jpeg_cu::jpeg_sizes(n, chunks, header_bytes, chunk_sizes, chunk_starts, file_sizes); });
    emulator::launch(1, 1, 1024, [&] { jpeg_cu::jpeg_offsets(n, file_sizes, offsets); });
    emulator::launch(grid, 1, 128, [&] {
        jpeg_cu::jpeg_write(chunks, image_blocks, chunk_blocks, headers, header_bytes, tokens, chunk_bytes,
                            chunk_starts, offsets, capacity, files);
    });
    std::copy((uint8_t*)files, files + capacity, files_out);
    std::copy((int64_t*)offsets, offsets + n + 1, offsets_out);
}

// The pixels that a decoder gets: pixels and out (n, height, width, channels). misalign, misalign_out: bytes by which
// the kernels' are off an aligned address, below 16.
void run_jpeg_reconstruct(const uint8_t* pixels, int32_t n, int32_t width, int32_t height, int32_t channels,
                          int32_t subsampling, int32_t quality, int32_t misalign, int32_t misalign_out,
                          uint8_t* out) {
    using namespace gpufgbg::jpeg;
    const bool grey = channels == 1;
    const int32_t h = grey || subsampling == 0 ? 1 : 2, v = !grey && subsampling == 2 ? 2 : 1;
    const int64_t luma_blocks = (int64_t)ceil_div(width, 8) * ceil_div(height, 8);
    const int64_t chroma_blocks = grey ? 0 : (int64_t)ceil_div(width, 8 * h) * ceil_div(height, 8 * v);
    const int64_t blocks = n * (luma_blocks + 2 * chroma_blocks), groups = (int64_t)n * height * ceil_div(width, 8);
    const size_t pixel_bytes = (size_t)n * width * height * channels;

    Guarded<uint8_t> memory("pixels", pixel_bytes + 16), setup_memory("setup", 4096);
    Guarded<uint8_t> planes("planes", (size_t)(grey ? 0 : 64 * blocks)), result("out", pixel_bytes + misalign_out);
    jpeg_cu::Setup* setup = (jpeg_cu::Setup*)(uint8_t*)setup_memory;
    uint8_t *from = memory + misalign, *to = result + misalign_out;
    std::copy(pixels, pixels + pixel_bytes, from);
    const std::vector<uint8_t> before((uint8_t*)result, to);

    const auto reconstruct = grey               ? jpeg_cu::jpeg_reconstruct_grey
                             : subsampling == 0 ? jpeg_cu::jpeg_reconstruct_444
                             : subsampling == 1 ? jpeg_cu::jpeg_reconstruct_422
                                                : jpeg_cu::jpeg_reconstruct_420;
    const auto upsample = subsampling == 0   ? jpeg_cu::jpeg_upsample_444
                          : subsampling == 1 ? jpeg_cu::jpeg_upsample_422
                                             : jpeg_cu::jpeg_upsample_420;
    emulator::launch(1, 1, 32, [&] { jpeg_cu::jpeg_setup(width, height, channels, subsampling, quality, setup); });
    emulator::launch((unsigned)((blocks + 127) / 128), 1, 128,
                     [&] { reconstruct(from, n, width, height, setup, grey ? to : planes); });
    if (!grey)
        emulator::launch((unsigned)((groups + 127) / 128), 1, 128, [&] { upsample(planes, n, width, height, to); });
    if (!std::equal(before.begin(), before.end(), (uint8_t*)result)) emulator::fail("written before out");
    std::copy(to, to + pixel_bytes, out);
}
}
