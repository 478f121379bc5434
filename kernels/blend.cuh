// The 8-bit blend of Pillow's `paste`: every composite and mask byte comes from here.
//
// Source: Pillow's definition of an 8-bit blend, out = div255(background * (255 - alpha) + foreground * alpha)
// with the rounding division div255(v) = ((v + 128) + ((v + 128) >> 8)) >> 8, exact for 0 <= v <= 255 * 255.
// Twin:   gpufgbg/backends/cpu.py (Numba). Judge: Pillow over all 256^3 inputs, tests/test_blend.py.
#pragma once

#include "philox.cuh"  // GPUFGBG_HD

namespace gpufgbg {

// round(v / 255) for v in 0..65025
GPUFGBG_HD uint32_t div255(uint32_t v) {
    v += 128u;
    return (v + (v >> 8)) >> 8;
}

GPUFGBG_HD uint8_t blend(uint8_t background, uint8_t foreground, uint8_t alpha) {
    return (uint8_t)div255((uint32_t)background * (255u - alpha) + (uint32_t)foreground * alpha);
}

// The grey mask pasted through itself onto black: `frame.paste(mask, (x, y), mask)`.
GPUFGBG_HD uint8_t blend_mask(uint8_t mask) { return (uint8_t)div255((uint32_t)mask * mask); }

}  // namespace gpufgbg
