// The arithmetic of the JPEG encoder: everything that decides a byte of a file, or of the pixels that a decoder makes
// of it, for host and device alike.
//
// Source: ITU-T T.81 (baseline sequential DCT, Annexes A, B, F and K) and JFIF 1.01, with the choices of
// libjpeg-turbo 3 behind Pillow's `save(..., "JPEG", quality=, subsampling=, optimize=)`: 16-bit fixed-point
// RGB->YCC, box downsampling with an alternating bias, the Loeffler-Ligtenberg-Moschytz DCT in 13-bit integers
// ("islow"), division rounding half away from zero, T.81 K.2 code lengths with the largest symbol preferred among
// equals. Back again, as its decoder does by default: the same DCT's inverse, triangle ("fancy") upsampling, 16-bit
// fixed-point YCC->RGB.
// Twins:  kernels/jpeg.cu (batched, on the GPU) and tests/host/jpeg_host.cpp (one thread, in CI).
// Judge:  Pillow, whole files and what it decodes from them, tests/test_jpeg_host.py.
//
// Vocabulary. A *class* is a pair of tables: 0 luma (or grey), 1 chroma. A *symbol* is T.81's run/size byte (AC) or
// size (DC). An *entry* numbers the symbols of all tables: class * 272 + (AC: symbol, DC: 256 + size); its low four
// bits are the size, the number of extra bits after the code. A *token* is a symbol with its extra bits, 32 bits:
//     bits 0..9 entry, bits 16..26 extra bits.
// A block is 2 to 64 tokens (DC, then AC symbols with ZRL and EOB among them), a scan is the tokens of its blocks in
// order, and a token costs at most 16 + 11 = 27 bits. The *book* of a picture maps an entry to what its tokens cost:
//     bits 0..4 code length + size, bits 5..31 the code, shifted left by size.
#pragma once

#include "philox.cuh"  // GPUFGBG_HD

#if defined(__CUDACC__)
#define GPUFGBG_UNROLL _Pragma("unroll")
#define GPUFGBG_KEEP_LOOP _Pragma("unroll 1")
#else
#define GPUFGBG_UNROLL
#define GPUFGBG_KEEP_LOOP
#endif

namespace gpufgbg::jpeg {

constexpr int kSide = 8;
constexpr int kBlock = 64;               // coefficients in a block, and the most tokens of a block
constexpr int kDcEntry = 256;            // first DC entry of a class
constexpr int kClassEntries = 256 + 16;  // entries of a class
constexpr int kMaxCodeLength = 16;
constexpr int kMaxLeaves = 192;  // symbols of a table with the reserved one, at most: 162 + 1 for AC

constexpr uint32_t kZeroRun = 0xF0;  // ZRL: sixteen zeros
constexpr uint32_t kEndOfBlock = 0x00;

GPUFGBG_HD int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
GPUFGBG_HD int32_t within(int32_t v, int32_t low, int32_t high) { return v < low ? low : v > high ? high : v; }
GPUFGBG_HD int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

// How many bits of v are 0 above the highest that is 1: 32 for 0.
GPUFGBG_HD int leading_zeros(uint32_t v) {
#if defined(__CUDA_ARCH__)
    return __clz((int)v);
#else
    return v ? __builtin_clz(v) : 32;
#endif
}

// Index of the lowest set bit of v != 0.
GPUFGBG_HD int lowest_bit(uint32_t v) {
#if defined(__CUDA_ARCH__)
    return __ffs((int)v) - 1;
#else
    return __builtin_ctz(v);
#endif
}

GPUFGBG_HD int count_bits(uint32_t v) {
#if defined(__CUDA_ARCH__)
    return __popc(v);
#else
    return __builtin_popcount(v);
#endif
}

// Sum of the products of the four bytes of a and b, plus c.
GPUFGBG_HD uint32_t dot4(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
    return __dp4a(a, b, c);
#else
    for (int byte = 0; byte < 32; byte += 8) c += ((a >> byte) & 255u) * ((b >> byte) & 255u);
    return c;
#endif
}

GPUFGBG_HD uint32_t swap_bytes(uint32_t v) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(v, 0u, 0x0123u);
#else
    return v >> 24 | (v >> 8 & 0xFF00u) | (v << 8 & 0xFF0000u) | v << 24;
#endif
}

// Bit 7 of every byte of the result: that byte of v is 0xFF.
GPUFGBG_HD uint32_t bytes_of_ones(uint32_t v) {
    const uint32_t inverse = ~v;
    return ~(((inverse & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | inverse | 0x7F7F7F7Fu);
}

// -------------------------------------------------------------------------------------------------------------------
// Frame: sizes in MCUs and blocks

// subsampling as Pillow numbers it: 0 4:4:4, 1 4:2:2, 2 4:2:0. A grey picture has blocks for MCUs whatever its
// subsampling, which then only shows in the header.
struct Frame {
    int32_t width, height, components;  // components: 1 or 3
    int32_t declared_h, declared_v;     // sampling factors of component 0 in the header
    int32_t h, v;                       // luma blocks in an MCU, across and down
};

GPUFGBG_HD Frame make_frame(int32_t width, int32_t height, int32_t components, int32_t subsampling) {
    const int32_t h = subsampling >= 1 ? 2 : 1, v = subsampling >= 2 ? 2 : 1;
    return {width, height, components, h, v, components == 1 ? 1 : h, components == 1 ? 1 : v};
}

GPUFGBG_HD int32_t mcus_across(const Frame& f) { return ceil_div(f.width, kSide * f.h); }
GPUFGBG_HD int32_t mcus_down(const Frame& f) { return ceil_div(f.height, kSide * f.v); }
GPUFGBG_HD int32_t blocks_per_mcu(const Frame& f) { return f.h * f.v + f.components - 1; }

// An MCU on the right or bottom edge may hold luma blocks that lie wholly outside: they repeat the DC of the block
// before them in the MCU and have no AC.
GPUFGBG_HD bool block_is_dummy(int32_t width, int32_t height, int32_t block_x, int32_t block_y) {
    return block_x * kSide >= width || block_y * kSide >= height;
}

// -------------------------------------------------------------------------------------------------------------------
// Colour: Y, Cb, Cr in 16-bit fixed point

// A pixel is packed as red | green << 8 | blue << 16; the top byte is ignored.
GPUFGBG_HD uint32_t pack_pixel(uint32_t red, uint32_t green, uint32_t blue) { return red | green << 8 | blue << 16; }

// Round(weight * 2^16) of JFIF's matrix; every row sums to a power of two.
//     Y  = ( 19595 R + 38470 G +  7471 B           + 2^15    ) >> 16
//     Cb = (-11058 R - 21710 G + 32768 B + 128 * 2^16 + 2^15 - 1) >> 16
//     Cr = ( 32768 R - 27439 G -  5329 B + 128 * 2^16 + 2^15 - 1) >> 16
// With the negative weights' bytes complemented all weights are positive and the constant becomes 2^16 - 1. Weights
// are split into a high and a low byte, so that a component is two four-way byte dot products.
struct Conversion {
    uint32_t complement, high, low, bias;
};

constexpr uint32_t split_high(uint32_t r, uint32_t g, uint32_t b) { return r >> 8 | (g >> 8) << 8 | (b >> 8) << 16; }
constexpr uint32_t split_low(uint32_t r, uint32_t g, uint32_t b) {
    return (r & 255u) | (g & 255u) << 8 | (b & 255u) << 16;
}
constexpr uint32_t kLumaHigh = split_high(19595, 38470, 7471), kLumaLow = split_low(19595, 38470, 7471);
constexpr uint32_t kBlueHigh = split_high(11058, 21710, 32768), kBlueLow = split_low(11058, 21710, 32768);
constexpr uint32_t kRedHigh = split_high(32768, 27439, 5329), kRedLow = split_low(32768, 27439, 5329);

GPUFGBG_HD Conversion conversion(int component) {
    if (component == 0) return {0u, kLumaHigh, kLumaLow, 32768u};
    if (component == 1) return {0x00FFFFu, kBlueHigh, kBlueLow, 65535u};
    return {0xFFFF00u, kRedHigh, kRedLow, 65535u};
}

GPUFGBG_HD uint32_t convert(uint32_t pixel, const Conversion& to) {
    pixel ^= to.complement;
    return ((dot4(pixel, to.high, 0u) << 8) + dot4(pixel, to.low, to.bias)) >> 16;
}

// Means of 2x1 and 2x2 samples, given their sum and the column of the result: the bias alternates 0, 1 and 1, 2.
GPUFGBG_HD uint32_t mean2(uint32_t sum, uint32_t column) { return (sum + (column & 1u)) >> 1; }
GPUFGBG_HD uint32_t mean4(uint32_t sum, uint32_t column) { return (sum + 1u + (column & 1u)) >> 2; }

// First picture row of a component's row: rows past the end repeat the component's last one.
GPUFGBG_HD int32_t source_row(int32_t row, int32_t height, int32_t v) {
    return v * least(row, ceil_div(height, v) - 1);
}

GPUFGBG_HD uint32_t read_pixel(const uint8_t* image, int32_t width, int32_t x, int32_t y) {
    const uint8_t* at = image + 3 * ((int64_t)y * width + x);
    return pack_pixel(at[0], at[1], at[2]);
}

// One sample of a component (x, y in the component's own grid) of an RGB picture (height, width, 3), edges
// replicated. h, v: how many pixels make a sample, across and down.
GPUFGBG_HD uint32_t component_sample(const uint8_t* image, int32_t width, int32_t height, const Conversion& to,
                                     int32_t h, int32_t v, int32_t x, int32_t y) {
    const int32_t top = source_row(y, height, v), left = least(h * x, width - 1);
    uint32_t sum = convert(read_pixel(image, width, left, top), to);
    if (h == 1) return sum;
    const int32_t right = least(h * x + 1, width - 1);
    sum += convert(read_pixel(image, width, right, top), to);
    if (v == 1) return mean2(sum, (uint32_t)x);
    const int32_t bottom = least(top + 1, height - 1);
    sum += convert(read_pixel(image, width, left, bottom), to) + convert(read_pixel(image, width, right, bottom), to);
    return mean4(sum, (uint32_t)x);
}

// The same for a grey picture (height, width).
GPUFGBG_HD uint32_t grey_sample(const uint8_t* image, int32_t width, int32_t height, int32_t x, int32_t y) {
    return image[(int64_t)least(y, height - 1) * width + least(x, width - 1)];
}

// -------------------------------------------------------------------------------------------------------------------
// Forward DCT

// T.81's order of coefficients: zigzag(k) is row * 8 + column of the k-th.
GPUFGBG_HD int zigzag(int k) {
    const uint8_t order[kBlock] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,
                                   12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
                                   35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
                                   58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};
    return order[k];
}

// The constants of Loeffler, Ligtenberg and Moschytz (ICASSP 1989, figure 1), rounded to 13 bits one by one. The
// integer result depends on that rounding, not on the order of the sums: nothing is rounded before the last shift, so
// the rotations are multiplied out here and the odd half is a 4x4 matrix of multiply-adds.
constexpr int kConstantBits = 13;
constexpr int kPass1Bits = 2;  // extra precision between the passes
constexpr int32_t k0298 = 2446, k0390 = 3196, k0541 = 4433, k0765 = 6270, k0899 = 7373, k1175 = 9633, k1501 = 12299,
                  k1847 = 15137, k1961 = 16069, k2053 = 16819, k2562 = 20995, k3072 = 25172;

// In-place DCT of eight numbers. Rows first: 8-bit samples give results times 4 * sqrt(8); then columns: the result
// is the coefficient times 8. Samples are not shifted by -128 here: that changes nothing but DC (see kDcShift).
template <bool Rows>
GPUFGBG_HD void dct8(int32_t (&d)[kSide]) {
    const int32_t sum0 = d[0] + d[7], sum1 = d[1] + d[6], sum2 = d[2] + d[5], sum3 = d[3] + d[4];
    const int32_t a = d[3] - d[4], b = d[2] - d[5], c = d[1] - d[6], e = d[0] - d[7];
    const int32_t even0 = sum0 + sum3, even1 = sum1 + sum2, even2 = sum1 - sum2, even3 = sum0 - sum3;

    constexpr int kShift = Rows ? kConstantBits - kPass1Bits : kConstantBits + kPass1Bits;
    constexpr int32_t kHalf = 1 << (kShift - 1);
    constexpr int32_t kOuter = 1 << (kPass1Bits - 1);
    d[0] = Rows ? (even0 + even1) * (1 << kPass1Bits) : (even0 + even1 + kOuter) >> kPass1Bits;
    d[4] = Rows ? (even0 - even1) * (1 << kPass1Bits) : (even0 - even1 + kOuter) >> kPass1Bits;
    d[2] = (even3 * (k0541 + k0765) + even2 * k0541 + kHalf) >> kShift;
    d[6] = (even3 * k0541 + even2 * (k0541 - k1847) + kHalf) >> kShift;

    d[7] = (a * (k0298 - k0899 - k1961 + k1175) + b * k1175 + c * (k1175 - k1961) + e * (k1175 - k0899) + kHalf) >>
           kShift;
    d[5] = (a * k1175 + b * (k2053 - k2562 - k0390 + k1175) + c * (k1175 - k2562) + e * (k1175 - k0390) + kHalf) >>
           kShift;
    d[3] = (a * (k1175 - k1961) + b * (k1175 - k2562) + c * (k3072 - k2562 - k1961 + k1175) + e * k1175 + kHalf) >>
           kShift;
    d[1] = (a * (k1175 - k0899) + b * (k1175 - k0390) + c * k1175 + e * (k1501 - k0899 - k0390 + k1175) + kHalf) >>
           kShift;
}

constexpr int32_t kDcShift = 8 * 8 * 128;  // what the level shift takes from the DC coefficient times 8

// -------------------------------------------------------------------------------------------------------------------
// Quantisation

// T.81 K.1 and K.2, natural order.
GPUFGBG_HD uint32_t base_quantum(int table, int natural) {
    const uint8_t luma[kBlock] = {16, 11, 10, 16, 24,  40,  51,  61,  12, 12, 14, 19, 26,  58,  60,  55,
                                  14, 13, 16, 24, 40,  57,  69,  56,  14, 17, 22, 29, 51,  87,  80,  62,
                                  18, 22, 37, 56, 68,  109, 103, 77,  24, 35, 55, 64, 81,  104, 113, 92,
                                  49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99};
    const uint8_t chroma[16] = {17, 18, 24, 47, 18, 21, 26, 66, 24, 26, 56, 99, 47, 66, 99, 99};
    if (table == 0) return luma[natural];
    const int row = natural >> 3, column = natural & 7;
    return row < 4 && column < 4 ? chroma[row * 4 + column] : 99;
}

// The quantiser step at a quality of 1..100, kept within 1..255 (baseline).
GPUFGBG_HD uint32_t quantum(int table, int natural, int quality) {
    const uint32_t percent = quality < 50 ? 5000u / (uint32_t)quality : 200u - 2u * (uint32_t)quality;
    const uint32_t step = (base_quantum(table, natural) * percent + 50u) / 100u;
    return step < 1u ? 1u : step > 255u ? 255u : step;
}

// Division of the coefficient times 8 by the step times 8 = divisor, halves away from zero, as a product with
// ceil(2^32 / divisor): exact for numerators below 2^32 / divisor, i.e. far beyond 8 * 1024 + divisor / 2.
struct Divisor {
    uint32_t half, reciprocal;
};

GPUFGBG_HD Divisor make_divisor(uint32_t step) {
    const uint32_t divisor = 8u * step;
    return {divisor / 2u, (uint32_t)(0xFFFFFFFFu / divisor) + 1u};
}

GPUFGBG_HD int32_t quantise(int32_t value, const Divisor& by) {
    const uint32_t numerator = (uint32_t)(value < 0 ? -value : value) + by.half;
#if defined(__CUDA_ARCH__)
    const int32_t quotient = (int32_t)__umulhi(numerator, by.reciprocal);
#else
    const int32_t quotient = (int32_t)(((uint64_t)numerator * by.reciprocal) >> 32);
#endif
    return value < 0 ? -quotient : quotient;
}

// -------------------------------------------------------------------------------------------------------------------
// Reconstruction: what libjpeg-turbo's decoder makes of a file, with its default options
//
// T.81 leaves a decoder's arithmetic open but for an accuracy; these are libjpeg-turbo's choices (jidctint.c,
// jdsample.c, jdmainct.c, jdcolor.c), which its C and SIMD code give alike, but for one place: see limited().

// The coefficient that a decoder gets: half is four steps.
GPUFGBG_HD int32_t dequantise(int32_t level, const Divisor& by) { return level * (int32_t)(by.half / 4u); }

// In-place inverse of dct8, without its scale: columns first, coefficients give results times 4 * sqrt(8); then rows,
// which give samples less 128. Nothing is rounded before the last shift here either. Results of the columns fit 16
// bits whatever the picture: a block's coefficients have at most the norm 8 * 128 of its samples, what quantising
// adds to the eight of a column at most 127.5 * sqrt(8), and (1024 + 361) * 4 * sqrt(8) < 2^14; in the same way no
// sum of the two passes leaves 32 bits, and none that SIMD code makes of two numbers leaves 16.
template <bool Columns>
GPUFGBG_HD void idct8(int32_t (&d)[kSide]) {
    constexpr int kShift = Columns ? kConstantBits - kPass1Bits : kConstantBits + kPass1Bits + 3;
    constexpr int32_t kHalf = 1 << (kShift - 1);
    const int32_t sum = (d[0] + d[4]) * (1 << kConstantBits) + kHalf;
    const int32_t difference = (d[0] - d[4]) * (1 << kConstantBits) + kHalf;
    const int32_t outer = d[2] * (k0541 + k0765) + d[6] * k0541;
    const int32_t inner = d[2] * k0541 + d[6] * (k0541 - k1847);
    const int32_t even0 = sum + outer, even1 = difference + inner, even2 = difference - inner, even3 = sum - outer;

    const int32_t a = d[7], b = d[5], c = d[3], e = d[1];
    const int32_t odd3 = a * (k0298 - k0899 - k1961 + k1175) + b * k1175 + c * (k1175 - k1961) + e * (k1175 - k0899);
    const int32_t odd2 = a * k1175 + b * (k2053 - k2562 - k0390 + k1175) + c * (k1175 - k2562) + e * (k1175 - k0390);
    const int32_t odd1 = a * (k1175 - k1961) + b * (k1175 - k2562) + c * (k3072 - k2562 - k1961 + k1175) + e * k1175;
    const int32_t odd0 = a * (k1175 - k0899) + b * (k1175 - k0390) + c * k1175 + e * (k1501 - k0899 - k0390 + k1175);

    d[0] = (even0 + odd0) >> kShift;
    d[1] = (even1 + odd1) >> kShift;
    d[2] = (even2 + odd2) >> kShift;
    d[3] = (even3 + odd3) >> kShift;
    d[4] = (even3 - odd3) >> kShift;
    d[5] = (even2 - odd2) >> kShift;
    d[6] = (even1 - odd1) >> kShift;
    d[7] = (even0 - odd0) >> kShift;
}

// The sample, from what the inverse DCT gives. libjpeg-turbo's SIMD code (x86-64, Arm) saturates, as here; its C code
// takes the value modulo 1024, which is the same below 512 either way. Only contrived pictures get beyond: the
// quantiser must move a sample by 384 at least.
GPUFGBG_HD uint32_t limited(int32_t value) { return (uint32_t)within(value + 128, 0, 255); }

// Where the samples of a component are in the scratch of a picture: its planes one after the other, each of whole
// blocks.
struct Plane {
    int64_t start;          // of its first sample
    int32_t stride;         // a multiple of 8, and so is the number of rows that there is room for
    int32_t columns, rows;  // samples that count; those after them are padding
};

GPUFGBG_HD int64_t plane_bytes(int32_t width, int32_t height, int32_t h, int32_t v) {
    return (int64_t)ceil_div(width, kSide * h) * ceil_div(height, kSide * v) * kBlock;
}

// h, v: pixels that make a chroma sample, across and down.
GPUFGBG_HD Plane plane_of(int component, int32_t width, int32_t height, int32_t h, int32_t v) {
    if (component == 0) return {0, kSide * ceil_div(width, kSide), width, height};
    const int64_t start = plane_bytes(width, height, 1, 1) + (component - 1) * plane_bytes(width, height, h, v);
    return {start, kSide * ceil_div(width, kSide * h), ceil_div(width, h), ceil_div(height, v)};
}

GPUFGBG_HD int64_t all_planes_bytes(int32_t width, int32_t height, int32_t h, int32_t v) {
    return plane_bytes(width, height, 1, 1) + 2 * plane_bytes(width, height, h, v);
}

// Eight samples from an address that is a multiple of 8.
GPUFGBG_HD void load_eight(const uint8_t* at, uint32_t (&sample)[kSide]) {
#if defined(__CUDA_ARCH__)
    const uint2 words = *(const uint2*)at;
    GPUFGBG_UNROLL
    for (int i = 0; i < kSide; ++i) sample[i] = (i < 4 ? words.x : words.y) >> (8 * (i % 4)) & 255u;
#else
    for (int i = 0; i < kSide; ++i) sample[i] = at[i];
#endif
}

// A component's samples for the eight pixels from (x, y) on, x a multiple of 8, those outside the picture being
// whatever. H, V: pixels that make a sample, across and down: 1, 1 or 2, 1 or 2, 2.
// A pixel's sample is 3/4 of the nearest one and 1/4 of the next nearest, across and down alike; halves are rounded
// down and up in turn. Past an edge the edge repeats, which is why the outermost pixels need no rule of their own. In
// planes of one or two columns the decoder repeats the nearest sample instead, across and down.
template <int H, int V>
GPUFGBG_HD void upsample_eight(const uint8_t* planes, const Plane& plane, int32_t x, int32_t y,
                               uint32_t (&sample)[kSide]) {
    static_assert(H * V == 1 || H == 2, "no other upsampling");
    const uint8_t* near = planes + plane.start + (int64_t)(y / V) * plane.stride;
    if constexpr (H == 1) {
        load_eight(near + x, sample);
        return;
    }
    const int32_t first = x / 2, last = plane.columns - 1;
    if (plane.columns <= 2) {
        GPUFGBG_UNROLL
        for (int i = 0; i < kSide; ++i) sample[i] = near[least(first + i / 2, last)];
        return;
    }
    const int32_t far_row = within(y / V + (y % V ? 1 : -1), 0, plane.rows - 1);
    const uint8_t* far = planes + plane.start + (int64_t)far_row * plane.stride;
    uint32_t column[kSide / 2 + 2];  // the four of these pixels and one beside them on each side
    GPUFGBG_UNROLL
    for (int i = 0; i < kSide / 2 + 2; ++i) {
        const int32_t at = within(first + i - 1, 0, last);
        column[i] = V == 1 ? near[at] : 3u * near[at] + far[at];
    }
    GPUFGBG_UNROLL
    for (int i = 0; i < kSide; ++i) {
        const uint32_t odd = (uint32_t)i % 2u, sum = 3u * column[1 + i / 2] + column[odd ? 2 + i / 2 : i / 2];
        sample[i] = V == 1 ? (sum + 1u + odd) >> 2 : (sum + 8u - odd) >> 4;
    }
}

// The packed pixel of Y, Cb, Cr: JFIF's matrix in 16-bit fixed point, each product rounded for itself but for green,
// whose two are rounded as one.
GPUFGBG_HD uint32_t to_rgb(uint32_t luma, uint32_t blue_chroma, uint32_t red_chroma) {
    const int32_t y = (int32_t)luma, cb = (int32_t)blue_chroma - 128, cr = (int32_t)red_chroma - 128;
    const int32_t red = y + ((91881 * cr + 32768) >> 16);
    const int32_t green = y + ((-22554 * cb - 46802 * cr + 32768) >> 16);
    const int32_t blue = y + ((116130 * cb + 32768) >> 16);
    return pack_pixel((uint32_t)within(red, 0, 255), (uint32_t)within(green, 0, 255), (uint32_t)within(blue, 0, 255));
}

// -------------------------------------------------------------------------------------------------------------------
// Tokens

// The zeros above a value's size bits; the size is 32 less these.
GPUFGBG_HD int zeros_above(int32_t value) { return leading_zeros((uint32_t)(value < 0 ? -value : value)); }

// The extra bits: a negative value is sent as value - 1, without the bits above its size.
GPUFGBG_HD uint32_t extra_bits(int32_t value, int zeros) {
    return (uint32_t)value + ((uint32_t)(value >> 31) & 0xFFFFFFFFu >> (zeros & 31));
}

GPUFGBG_HD uint32_t make_token(uint32_t entry, uint32_t extra) { return entry | extra << 16; }
GPUFGBG_HD uint32_t token_entry(uint32_t token) { return token & 0x3FFu; }

GPUFGBG_HD uint32_t dc_token(int table_class, int32_t difference) {
    const int zeros = zeros_above(difference);
    return make_token((uint32_t)(table_class * kClassEntries + kDcEntry + 32 - zeros), extra_bits(difference, zeros));
}

// Calls emit(entry, extra bits) for the AC coefficients of a block, value(k) being coefficient k in zigzag order.
// nonzero_low, nonzero_high: bit k of the pair says that coefficient k is not 0; bit 0 (DC) is ignored.
template <class Value, class Emit>
GPUFGBG_HD void tokenise_ac(int table_class, uint32_t nonzero_low, uint32_t nonzero_high, const Value& value,
                            const Emit& emit) {
    const uint32_t base = (uint32_t)(table_class * kClassEntries);
    uint32_t behind = 1;  // the last coefficient that was not 0, plus 1
    uint32_t pending = nonzero_low & ~1u;
    GPUFGBG_KEEP_LOOP
    for (uint32_t half = 0; half < kBlock; half += 32) {
        GPUFGBG_KEEP_LOOP
        while (pending) {
            const uint32_t k = half + (uint32_t)lowest_bit(pending);
            pending &= pending - 1u;
            uint32_t run = k - behind;
            behind = k + 1u;
            GPUFGBG_KEEP_LOOP
            for (; run > 15u; run -= 16u) emit(base + kZeroRun, 0u);
            const int32_t v = value(k);
            const int zeros = zeros_above(v);
            emit(base + 32u + 16u * run - (uint32_t)zeros, extra_bits(v, zeros));
        }
        pending = nonzero_high;
    }
    if (behind < kBlock) emit(base + kEndOfBlock, 0u);
}

// Number of tokens that tokenise_ac emits.
GPUFGBG_HD int count_ac_tokens(uint32_t nonzero_low, uint32_t nonzero_high) {
    nonzero_low &= ~1u;
    const uint64_t set = (uint64_t)nonzero_high << 32 | nonzero_low | 1u;  // DC bounds the first run
    int count = count_bits(nonzero_low) + count_bits(nonzero_high) + (nonzero_high >> 31 ? 0 : 1);
    // Sixteen zeros in a row below the highest one: rare, so looked for before they are counted. Zeros above the
    // highest one are filled in first.
    uint64_t filled = set;
    const int top = nonzero_high ? 63 - leading_zeros(nonzero_high) : 31 - leading_zeros((uint32_t)set);
    filled |= ~0ull << top;
    uint64_t runs = ~filled;
    runs &= runs >> 1;
    runs &= runs >> 2;
    runs &= runs >> 4;
    runs &= runs >> 8;
    if (runs) {
        int last = 0;
        uint32_t pending = nonzero_low;
        GPUFGBG_KEEP_LOOP
        for (int half = 0; half < kBlock; half += 32) {
            GPUFGBG_KEEP_LOOP
            for (; pending; pending &= pending - 1u) {
                const int k = half + lowest_bit(pending);
                count += (k - last - 1) >> 4;
                last = k;
            }
            pending = nonzero_high;
        }
    }
    return count;
}

// -------------------------------------------------------------------------------------------------------------------
// Huffman tables

// The code's symbols in order of code (T.81's BITS and HUFFVAL).
struct HuffmanTable {
    uint8_t lengths[kMaxCodeLength + 1];  // [l]: how many codes are l bits long; [0] is the number of symbols
    uint8_t symbols[kMaxLeaves];
};

// A book's entry for a symbol with its code.
GPUFGBG_HD uint32_t book_entry(uint32_t code, uint32_t length, uint32_t symbol) {
    const uint32_t size = symbol & 15u;
    return code << (size + 5u) | (length + size);
}
GPUFGBG_HD uint32_t book_length(uint32_t entry) { return entry & 31u; }
GPUFGBG_HD uint32_t token_bits(uint32_t entry, uint32_t token) { return entry >> 5 | token >> 16; }

// Who works on a table: lanes that hold one another's results. OneLane is the host's; jpeg.cu has a warp.
struct OneLane {
    static constexpr int kLanes = 1;
    int lane() const { return 0; }
    void sync() const {}
    uint32_t min(uint32_t v) const { return v; }
    int32_t max(int32_t v) const { return v; }
    uint32_t ballot(bool v) const { return v; }
    uint32_t alike(uint32_t, bool among) const { return among; }  // the lanes among which v is the same
};

struct HuffmanScratch {
    uint32_t frequency[kMaxLeaves];
    uint16_t symbol[kMaxLeaves];      // leaf -> symbol, increasing; the reserved symbol 256 is the last leaf
    uint16_t node[kMaxLeaves];        // leaf's place -> the tree node now there
    uint16_t parent[2 * kMaxLeaves];  // node -> node; leaves come first
    uint16_t at_depth[64];            // how many leaves
    uint16_t next[64];                // where the next leaf of a depth goes in order of code
};

// Per-symbol optimal code (T.81 K.2) limited to 16 bits (K.3), as libjpeg makes it: the two rarest nodes are joined,
// of equally rare ones those in the highest place first, and the joint node takes the place of the rarer one; a
// reserved symbol of frequency 1 in the last place keeps the code of all ones free. histogram: n_symbols counts, at
// least one not 0, at most kMaxLeaves - 1 of them not 0, their sum below 2^32 - 1.
template <class Lanes>
GPUFGBG_HD void optimal_table(const Lanes& lanes, const uint32_t* histogram, int n_symbols, HuffmanScratch& scratch,
                              HuffmanTable& table) {
    constexpr int kLanes = Lanes::kLanes;
    constexpr int kSlots = kMaxLeaves / kLanes;
    constexpr uint32_t kGone = 0xFFFFFFFFu;
    const int lane = lanes.lane();
    const uint32_t lower_lanes = (1u << lane) - 1u;

    // Leaves: the symbols that occur, then the reserved one.
    int n_leaves = 0;
    for (int first = 0; first < n_symbols; first += kLanes) {
        const int symbol = first + lane;
        const uint32_t count = symbol < n_symbols ? histogram[symbol] : 0u;
        const uint32_t present = lanes.ballot(count != 0u);
        if (count) {
            const int leaf = n_leaves + count_bits(present & lower_lanes);
            scratch.frequency[leaf] = count;
            scratch.symbol[leaf] = (uint16_t)symbol;
        }
        n_leaves += count_bits(present);
    }
    if (lane == 0) {
        scratch.frequency[n_leaves] = 1u;
        scratch.symbol[n_leaves] = 256;
    }
    ++n_leaves;
    for (int i = lane; i < 64; i += kLanes) scratch.at_depth[i] = 0;
    lanes.sync();

    // Each lane keeps every kLanes-th place.
    uint32_t frequency[kSlots];
    GPUFGBG_UNROLL
    for (int slot = 0; slot < kSlots; ++slot) {
        const int place = slot * kLanes + lane;
        frequency[slot] = place < n_leaves ? scratch.frequency[place] : kGone;
        if (place < n_leaves) scratch.node[place] = (uint16_t)place;
    }
    lanes.sync();

    for (int joint = n_leaves; joint < 2 * n_leaves - 1; ++joint) {
        uint32_t rarest = 0u, joint_frequency = 0u;
        int place[2] = {0, 0};
        for (int child = 0; child < 2; ++child) {
            uint32_t mine = kGone;
            int my_place = -1;
            GPUFGBG_UNROLL
            for (int slot = 0; slot < kSlots; ++slot) {
                if (slot * kLanes >= n_leaves) break;
                if (frequency[slot] <= mine && frequency[slot] != kGone) {
                    mine = frequency[slot];
                    my_place = slot * kLanes + lane;
                }
            }
            rarest = lanes.min(mine);
            place[child] = lanes.max(mine == rarest ? my_place : -1);
            joint_frequency += rarest;
            GPUFGBG_UNROLL
            for (int slot = 0; slot < kSlots; ++slot)
                if (slot * kLanes + lane == place[child]) frequency[slot] = kGone;
        }
        GPUFGBG_UNROLL
        for (int slot = 0; slot < kSlots; ++slot)
            if (slot * kLanes + lane == place[0]) frequency[slot] = joint_frequency;
        if (lane == 0) {
            scratch.parent[scratch.node[place[0]]] = (uint16_t)joint;
            scratch.parent[scratch.node[place[1]]] = (uint16_t)joint;
            scratch.node[place[0]] = (uint16_t)joint;
        }
    }
    lanes.sync();

    // Depths; Fibonacci counts would need a sum over 2^32 to go deeper than 46.
    const int root = 2 * n_leaves - 2;
    for (int first = 0; first < n_leaves; first += kLanes) {
        const int leaf = first + lane;
        uint32_t depth = 0;
        if (leaf < n_leaves)
            for (int node = leaf; node != root; node = scratch.parent[node]) ++depth;
        const uint32_t alike = lanes.alike(depth, leaf < n_leaves);
        if (leaf < n_leaves) {
            scratch.frequency[leaf] = depth;
            if ((alike & lower_lanes) == 0u) scratch.at_depth[depth] += (uint16_t)count_bits(alike);
        }
        lanes.sync();
    }

    // Codes go in order of depth, then symbol. The limit of 16 bits then moves only how many codes each length has:
    // a pair of longest leaves gives one up to a leaf of a shorter length, which becomes a pair one longer.
    if (lane == 0) {
        int next = 0, deepest = 0;
        for (int depth = 1; depth < 64; ++depth) {
            scratch.next[depth] = (uint16_t)next;
            next += scratch.at_depth[depth];
            if (scratch.at_depth[depth]) deepest = depth;
        }
        uint16_t* at = scratch.at_depth;
        for (int depth = deepest; depth > kMaxCodeLength; --depth) {
            while (at[depth] > 0) {
                int shorter = depth - 2;
                while (at[shorter] == 0) --shorter;
                at[depth] -= 2;
                at[depth - 1] += 1;
                at[shorter + 1] += 2;
                at[shorter] -= 1;
            }
        }
        int longest = deepest < kMaxCodeLength ? deepest : kMaxCodeLength;
        while (at[longest] == 0) --longest;
        at[longest] -= 1;  // the reserved symbol
        table.lengths[0] = (uint8_t)(n_leaves - 1);
        for (int length = 1; length <= kMaxCodeLength; ++length) table.lengths[length] = (uint8_t)at[length];
    }
    lanes.sync();

    for (int first = 0; first < n_leaves; first += kLanes) {
        const int leaf = first + lane;
        const uint32_t depth = leaf < n_leaves ? scratch.frequency[leaf] : 0u;
        const uint32_t alike = lanes.alike(depth, leaf < n_leaves);
        const int rank = leaf < n_leaves ? scratch.next[depth] + count_bits(alike & lower_lanes) : kMaxLeaves;
        lanes.sync();
        if (leaf < n_leaves && (alike & lower_lanes) == 0u) scratch.next[depth] += (uint16_t)count_bits(alike);
        if (rank < n_leaves - 1) table.symbols[rank] = (uint8_t)scratch.symbol[leaf];  // the reserved one is last
        lanes.sync();
    }
}

// Canonical codes (T.81 Annex C) into a table's part of the book: book[symbol].
template <class Lanes>
GPUFGBG_HD void fill_book(const Lanes& lanes, const HuffmanTable& table, uint32_t* book) {
    for (int rank = lanes.lane(); rank < table.lengths[0]; rank += Lanes::kLanes) {
        int length = 1, before = 0;
        uint32_t first_code = 0;
        while (rank >= before + table.lengths[length]) {
            before += table.lengths[length];
            first_code = (first_code + table.lengths[length]) << 1;
            ++length;
        }
        const uint32_t symbol = table.symbols[rank];
        book[symbol] = book_entry(first_code + (uint32_t)(rank - before), (uint32_t)length, symbol);
    }
}

// The tables of T.81 K.3 to K.6. kind: 0 DC, 1 AC. Everything but the AC lengths and the order of the frequent AC
// symbols is regular.
template <class Lanes>
GPUFGBG_HD void standard_table(const Lanes& lanes, int table_class, int kind, HuffmanTable& table) {
    const uint8_t dc_lengths[2][17] = {{12, 0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0},
                                       {12, 0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0}};
    const uint8_t ac_lengths[2][17] = {{162, 0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 125},
                                       {162, 0, 2, 1, 2, 4, 4, 3, 4, 7, 5, 4, 4, 0, 1, 2, 119}};
    const uint8_t ac_symbols[2][162] = {
        {0x01, 0x02, 0x03, 0x00, 0x04, 0x11, 0x05, 0x12, 0x21, 0x31, 0x41, 0x06, 0x13, 0x51, 0x61, 0x07, 0x22, 0x71,
         0x14, 0x32, 0x81, 0x91, 0xA1, 0x08, 0x23, 0x42, 0xB1, 0xC1, 0x15, 0x52, 0xD1, 0xF0, 0x24, 0x33, 0x62, 0x72,
         0x82, 0x09, 0x0A, 0x16, 0x17, 0x18, 0x19, 0x1A, 0x25, 0x26, 0x27, 0x28, 0x29, 0x2A, 0x34, 0x35, 0x36, 0x37,
         0x38, 0x39, 0x3A, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4A, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59,
         0x5A, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6A, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7A, 0x83,
         0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9A, 0xA2, 0xA3,
         0xA4, 0xA5, 0xA6, 0xA7, 0xA8, 0xA9, 0xAA, 0xB2, 0xB3, 0xB4, 0xB5, 0xB6, 0xB7, 0xB8, 0xB9, 0xBA, 0xC2, 0xC3,
         0xC4, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xCA, 0xD2, 0xD3, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8, 0xD9, 0xDA, 0xE1, 0xE2,
         0xE3, 0xE4, 0xE5, 0xE6, 0xE7, 0xE8, 0xE9, 0xEA, 0xF1, 0xF2, 0xF3, 0xF4, 0xF5, 0xF6, 0xF7, 0xF8, 0xF9, 0xFA},
        {0x00, 0x01, 0x02, 0x03, 0x11, 0x04, 0x05, 0x21, 0x31, 0x06, 0x12, 0x41, 0x51, 0x07, 0x61, 0x71, 0x13, 0x22,
         0x32, 0x81, 0x08, 0x14, 0x42, 0x91, 0xA1, 0xB1, 0xC1, 0x09, 0x23, 0x33, 0x52, 0xF0, 0x15, 0x62, 0x72, 0xD1,
         0x0A, 0x16, 0x24, 0x34, 0xE1, 0x25, 0xF1, 0x17, 0x18, 0x19, 0x1A, 0x26, 0x27, 0x28, 0x29, 0x2A, 0x35, 0x36,
         0x37, 0x38, 0x39, 0x3A, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4A, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58,
         0x59, 0x5A, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6A, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7A,
         0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9A,
         0xA2, 0xA3, 0xA4, 0xA5, 0xA6, 0xA7, 0xA8, 0xA9, 0xAA, 0xB2, 0xB3, 0xB4, 0xB5, 0xB6, 0xB7, 0xB8, 0xB9, 0xBA,
         0xC2, 0xC3, 0xC4, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xCA, 0xD2, 0xD3, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8, 0xD9, 0xDA,
         0xE2, 0xE3, 0xE4, 0xE5, 0xE6, 0xE7, 0xE8, 0xE9, 0xEA, 0xF2, 0xF3, 0xF4, 0xF5, 0xF6, 0xF7, 0xF8, 0xF9, 0xFA}};
    for (int i = lanes.lane(); i <= kMaxCodeLength; i += Lanes::kLanes)
        table.lengths[i] = kind ? ac_lengths[table_class][i] : dc_lengths[table_class][i];
    const int n_symbols = kind ? 162 : 12;
    for (int i = lanes.lane(); i < n_symbols; i += Lanes::kLanes)
        table.symbols[i] = kind ? ac_symbols[table_class][i] : (uint8_t)i;
    lanes.sync();
}

// -------------------------------------------------------------------------------------------------------------------
// Markers (T.81 Annex B, JFIF 1.01): prefix, one DHT a table (DC then AC of a class), scan header, data, EOI

constexpr int kMaxPrefix = 2 + 18 + 2 * 69 + 19;            // SOI, APP0, DQT (one a class), SOF0
constexpr int kMaxTables = 2 * (21 + 12) + 2 * (21 + 162);  // four DHT
constexpr int kMaxScanHeader = 14;                          // SOS
constexpr int kMaxHeader = kMaxPrefix + kMaxTables + kMaxScanHeader;
static_assert(kMaxHeader == 623, "stated to callers");

struct ByteWriter {
    uint8_t* at;
    GPUFGBG_HD void byte(int value) { *at++ = (uint8_t)value; }
    GPUFGBG_HD void pair(int value) {
        byte(value >> 8);
        byte(value & 255);
    }
};

// SOI to SOF0. Returns its length; `to` has room for kMaxPrefix bytes.
GPUFGBG_HD int write_prefix(uint8_t* to, const Frame& frame, int quality) {
    const uint8_t jfif[14] = {'J', 'F', 'I', 'F', 0, 1, 1,
                              0,   0,   1,   0,   1, 0, 0};  // 1.01, no unit, aspect 1:1, no thumbnail
    ByteWriter writer = {to};
    writer.pair(0xFFD8);
    writer.pair(0xFFE0);
    writer.pair(2 + 14);
    for (int i = 0; i < 14; ++i) writer.byte(jfif[i]);
    for (int table = 0; table < (frame.components == 1 ? 1 : 2); ++table) {
        writer.pair(0xFFDB);
        writer.pair(2 + 1 + kBlock);
        writer.byte(table);
        for (int k = 0; k < kBlock; ++k) writer.byte((int)quantum(table, zigzag(k), quality));
    }
    writer.pair(0xFFC0);
    writer.pair(8 + 3 * frame.components);
    writer.byte(8);
    writer.pair(frame.height);
    writer.pair(frame.width);
    writer.byte(frame.components);
    for (int component = 0; component < frame.components; ++component) {
        writer.byte(component + 1);
        writer.byte(component == 0 ? frame.declared_h << 4 | frame.declared_v : 0x11);
        writer.byte(component == 0 ? 0 : 1);
    }
    return (int)(writer.at - to);
}

GPUFGBG_HD int table_segment_bytes(const HuffmanTable& table) {
    return 2 + 2 + 1 + kMaxCodeLength + table.lengths[0];
}

// One DHT. kind: 0 DC, 1 AC.
template <class Lanes>
GPUFGBG_HD void write_table_segment(const Lanes& lanes, uint8_t* to, int table_class, int kind,
                                    const HuffmanTable& table) {
    const int total = table_segment_bytes(table);
    for (int i = lanes.lane(); i < total; i += Lanes::kLanes) {
        int value;
        if (i < 2)
            value = i == 0 ? 0xFF : 0xC4;
        else if (i < 4)
            value = i == 2 ? (total - 2) >> 8 : (total - 2) & 255;
        else if (i == 4)
            value = kind << 4 | table_class;
        else if (i < 21)
            value = table.lengths[i - 4];
        else
            value = table.symbols[i - 21];
        to[i] = (uint8_t)value;
    }
}

// SOS. Returns its length.
GPUFGBG_HD int write_scan_header(uint8_t* to, int components) {
    ByteWriter writer = {to};
    writer.pair(0xFFDA);
    writer.pair(6 + 2 * components);
    writer.byte(components);
    for (int component = 0; component < components; ++component) {
        writer.byte(component + 1);
        writer.byte(component == 0 ? 0x00 : 0x11);
    }
    writer.byte(0);
    writer.byte(kBlock - 1);
    writer.byte(0);
    return (int)(writer.at - to);
}

}  // namespace gpufgbg::jpeg
