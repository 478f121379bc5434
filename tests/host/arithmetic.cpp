// Host build of the headers that decide bytes, for tests on machines without a GPU.
#include "../../kernels/blend.cuh"
#include "../../kernels/philox.cuh"

using namespace gpufgbg;

extern "C" {

// counters (n, 4) uint32, key (2) uint32 -> words (n, 4) uint32
void philox(int64_t n, const uint32_t* counters, const uint32_t* key, uint32_t* words) {
    for (int64_t i = 0; i < n; ++i) {
        const Philox4x32 counter = {{counters[4 * i], counters[4 * i + 1], counters[4 * i + 2], counters[4 * i + 3]}};
        const Philox4x32 random = philox4x32_10(counter, key[0], key[1]);
        for (int w = 0; w < 4; ++w) words[4 * i + w] = random.word[w];
    }
}

// indices (n) uint64, spans (n, 2) uint32 -> places (n, 2) uint32: x and y as composite.cu draws them
void place(int64_t n, uint64_t seed, const uint64_t* indices, const uint32_t* spans, uint32_t* places) {
    for (int64_t i = 0; i < n; ++i) {
        const Philox4x32 random = philox_sample(seed, indices[i]);
        for (int w = 0; w < 2; ++w) places[2 * i + w] = uniform_below(random.word[w], spans[2 * i + w]);
    }
}

// out (256, 256) uint8: rows by background, columns by foreground
void blend_all(int32_t alpha, uint8_t* out) {
    for (int b = 0; b < 256; ++b)
        for (int f = 0; f < 256; ++f) out[256 * b + f] = blend((uint8_t)b, (uint8_t)f, (uint8_t)alpha);
}

// out (256) uint8
void blend_mask_all(uint8_t* out) {
    for (int m = 0; m < 256; ++m) out[m] = blend_mask((uint8_t)m);
}
}
