// Composites and masks for a batch of samples, straight from the packed assets.
//
// Algorithm: ORIGINAL.md steps 2 to 4: the placement comes from Philox (key = seed, counter = sample index), the
// composite is Pillow's paste of the foreground through its own alpha, the mask its grey mask pasted through
// itself onto black. Twin: gpufgbg/backends/cpu.py.
//
// This is the plain version: one block a sample, one thread a pixel at a time, each output byte written once.
#include "blend.cuh"
#include "philox.cuh"

using namespace gpufgbg;

// backgrounds  (B, H, W, 3) uint8
// foregrounds  (P) RGBA pixels, straight alpha, foreground f's rows at offsets[f]
// masks        (P) uint8, laid out like foregrounds
// offsets      (F + 1) int64, in pixels
// widths       (F) int32; heights (F) int32
// first, count samples first .. first + count - 1, in the order background, foreground, repetition, orientation
// flip_mode    0: never, 1: always, 2: both (flipped first)
// out: composites (count, H, W, 3) uint8, mattes (count, H, W) uint8, placements (count, 2) int32 x, y
extern "C" __global__ void composite(const uint8_t* __restrict__ backgrounds, const uchar4* __restrict__ foregrounds,
                                     const uint8_t* __restrict__ masks, const int64_t* __restrict__ offsets,
                                     const int32_t* __restrict__ widths, const int32_t* __restrict__ heights,
                                     int32_t width, int32_t height, int32_t n_foregrounds, int32_t per_pair,
                                     int32_t flip_mode, uint64_t seed, int64_t first, int32_t count,
                                     uint8_t* __restrict__ composites, uint8_t* __restrict__ mattes,
                                     int32_t* __restrict__ placements) {
    const int32_t n = blockIdx.x;
    if (n >= count) return;
    const int64_t index = first + n;
    const int orientations = flip_mode == 2 ? 2 : 1;
    const bool flipped = flip_mode == 2 ? index % 2 == 0 : flip_mode == 1;
    const int64_t pair = index / orientations / per_pair;
    const int64_t f = pair % n_foregrounds;
    const int64_t b = pair / n_foregrounds;
    const int32_t w = widths[f], h = heights[f];
    const Philox4x32 random = philox_sample(seed, (uint64_t)index);
    const int32_t x = (int32_t)uniform_below(random.word[0], (uint32_t)(width - w + 1));
    const int32_t y = (int32_t)uniform_below(random.word[1], (uint32_t)(height - h + 1));
    if (threadIdx.x == 0) {
        placements[2 * (int64_t)n] = x;
        placements[2 * (int64_t)n + 1] = y;
    }
    const int64_t pixels = (int64_t)width * height;
    for (int64_t p = threadIdx.x; p < pixels; p += blockDim.x) {
        const int32_t row = (int32_t)(p / width) - y, column = (int32_t)(p % width) - x;
        const uint8_t* from = backgrounds + 3 * (b * pixels + p);
        uint8_t red = from[0], green = from[1], blue = from[2], matte = 0;
        if (row >= 0 && row < h && column >= 0 && column < w) {
            const int64_t at = offsets[f] + (int64_t)row * w + (flipped ? w - 1 - column : column);
            const uchar4 over = foregrounds[at];
            red = blend(red, over.x, over.w);
            green = blend(green, over.y, over.w);
            blue = blend(blue, over.z, over.w);
            matte = blend_mask(masks[at]);
        }
        uint8_t* to = composites + 3 * ((int64_t)n * pixels + p);
        to[0] = red;
        to[1] = green;
        to[2] = blue;
        mattes[(int64_t)n * pixels + p] = matte;
    }
}
