// Philox 4x32-10: the counter-based generator behind every placement.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC '11 (Random123).
// Twin:   gpufgbg/recipe.py (NumPy). Judge: Random123's known-answer vectors, tests/test_philox.py.
//
// A sample's placement is a pure function of (seed, sample index): key = seed, counter = index. No state is
// kept anywhere, so any thread, card or machine can make any sample.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define GPUFGBG_HD __host__ __device__ __forceinline__
#else
#define GPUFGBG_HD inline
#endif

namespace gpufgbg {

struct Philox4x32 {
    uint32_t word[4];
};

// Ten rounds over a 128-bit counter with a 64-bit key (low word first in both).
GPUFGBG_HD Philox4x32 philox4x32_10(Philox4x32 counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = (uint64_t)0xD2511F53u * counter.word[0];
        const uint64_t product1 = (uint64_t)0xCD9E8D57u * counter.word[2];
        const Philox4x32 next = {{(uint32_t)(product1 >> 32) ^ counter.word[1] ^ key0, (uint32_t)product1,
                                  (uint32_t)(product0 >> 32) ^ counter.word[3] ^ key1, (uint32_t)product0}};
        counter = next;
        key0 += 0x9E3779B9u;  // the golden ratio
        key1 += 0xBB67AE85u;  // sqrt(3) - 1
    }
    return counter;
}

// The generator's four words for one sample: counter = (index low, index high, 0, 0), key = seed.
GPUFGBG_HD Philox4x32 philox_sample(uint64_t seed, uint64_t index) {
    const Philox4x32 counter = {{(uint32_t)index, (uint32_t)(index >> 32), 0u, 0u}};
    return philox4x32_10(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
}

// Uniform integer in [0, span), span in 1..2^31: the high half of word * span (Lemire 2019, without
// rejection). Each value's probability is off by less than span / 2^32.
GPUFGBG_HD uint32_t uniform_below(uint32_t word, uint32_t span) { return (uint32_t)(((uint64_t)word * span) >> 32); }

}  // namespace gpufgbg
