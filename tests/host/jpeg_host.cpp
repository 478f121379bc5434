// A plain, single-threaded JPEG encoder made of the functions in kernels/jpeg.cuh, for machines without a GPU; and
// the pixels that a decoder makes of its files, without the files.
//
// Purpose: judge the arithmetic that the GPU encoder shares. tests/test_jpeg_host.py builds this file with the host's
// compiler, loads it with ctypes and compares whole files with Pillow's, and the pixels with what Pillow decodes.
#include <stddef.h>
#include <string.h>

#include <vector>

#include "../../kernels/jpeg.cuh"

using namespace gpufgbg::jpeg;

namespace {

// The quantised coefficients of one block in zigzag order, from a function (x, y) -> sample.
template <class Sample>
void transform(const Sample& sample, const Divisor* divisors, int32_t (&coefficients)[kBlock]) {
    int32_t grid[kSide][kSide];
    for (int row = 0; row < kSide; ++row) {
        for (int column = 0; column < kSide; ++column) grid[row][column] = (int32_t)sample(column, row);
        dct8<true>(grid[row]);
    }
    int32_t quantised[kBlock];
    for (int column = 0; column < kSide; ++column) {
        int32_t line[kSide];
        for (int row = 0; row < kSide; ++row) line[row] = grid[row][column];
        dct8<false>(line);
        if (column == 0) line[0] -= kDcShift;
        for (int row = 0; row < kSide; ++row)
            quantised[row * kSide + column] = quantise(line[row], divisors[row * kSide + column]);
    }
    for (int k = 0; k < kBlock; ++k) coefficients[k] = quantised[zigzag(k)];
}

// The decoded samples of such a block, its first one at `to`.
void inverse_transform(const int32_t (&coefficients)[kBlock], const Divisor* divisors, uint8_t* to, int32_t stride) {
    int32_t grid[kSide][kSide];
    for (int k = 0; k < kBlock; ++k) {
        const int natural = zigzag(k);
        grid[natural / kSide][natural % kSide] = dequantise(coefficients[k], divisors[natural]);
    }
    for (int column = 0; column < kSide; ++column) {
        int32_t line[kSide];
        for (int row = 0; row < kSide; ++row) line[row] = grid[row][column];
        idct8<true>(line);
        for (int row = 0; row < kSide; ++row) grid[row][column] = line[row];
    }
    for (int row = 0; row < kSide; ++row) {
        idct8<false>(grid[row]);
        for (int column = 0; column < kSide; ++column)
            to[(size_t)row * stride + column] = (uint8_t)limited(grid[row][column]);
    }
}

template <int H, int V>
void upsample(const uint8_t* planes, int32_t width, int32_t height, uint8_t* out) {
    for (int32_t y = 0; y < height; ++y)
        for (int32_t x = 0; x < width; x += kSide) {
            uint32_t luma[kSide], blue[kSide], red[kSide];
            upsample_eight<1, 1>(planes, plane_of(0, width, height, H, V), x, y, luma);
            upsample_eight<H, V>(planes, plane_of(1, width, height, H, V), x, y, blue);
            upsample_eight<H, V>(planes, plane_of(2, width, height, H, V), x, y, red);
            for (int i = 0; i < kSide && x + i < width; ++i) {
                const uint32_t pixel = to_rgb(luma[i], blue[i], red[i]);
                for (int c = 0; c < 3; ++c) *out++ = (uint8_t)(pixel >> (8 * c));
            }
        }
}

struct Scan {
    std::vector<uint32_t> tokens;
    uint32_t histogram[2 * kClassEntries] = {};

    void add(uint32_t token) {
        ++histogram[token_entry(token)];
        tokens.push_back(token);
    }
};

// Appends the tokens of one block; false if their number is not what count_ac_tokens foretold.
bool add_block(Scan& scan, int table_class, int32_t difference, const int32_t (&coefficients)[kBlock]) {
    uint64_t nonzero = 0;
    for (int k = 0; k < kBlock; ++k) nonzero |= (uint64_t)(coefficients[k] != 0) << k;
    const uint32_t low = (uint32_t)nonzero, high = (uint32_t)(nonzero >> 32);
    scan.add(dc_token(table_class, difference));
    const size_t before = scan.tokens.size();
    tokenise_ac(
        table_class, low, high, [&](uint32_t k) { return coefficients[k]; },
        [&](uint32_t entry, uint32_t extra) { scan.add(make_token(entry, extra)); });
    const size_t emitted = scan.tokens.size() - before;
    return emitted == (size_t)count_ac_tokens(low, high) && emitted < (size_t)kBlock;
}

}  // namespace

// pixels       (height, width, channels) uint8, channels 1 or 3
// subsampling  0 4:4:4, 1 4:2:2, 2 4:2:0; quality 1..100; optimize 0 or 1
// out          (capacity) uint8
// Returns the file's size (larger than capacity: out is cut), or a negative number where the arithmetic contradicts
// itself.
extern "C" int64_t encode(const uint8_t* pixels, int32_t width, int32_t height, int32_t channels, int32_t subsampling,
                          int32_t quality, int32_t optimize, uint8_t* out, int64_t capacity) {
    const Frame frame = make_frame(width, height, channels, subsampling);
    const int classes = channels == 1 ? 1 : 2;
    Divisor divisors[2][kBlock];
    for (int table = 0; table < classes; ++table)
        for (int i = 0; i < kBlock; ++i) divisors[table][i] = make_divisor(quantum(table, i, quality));

    Scan scan;
    int32_t previous[3] = {0, 0, 0};
    for (int32_t mcu_y = 0; mcu_y < mcus_down(frame); ++mcu_y)
        for (int32_t mcu_x = 0; mcu_x < mcus_across(frame); ++mcu_x)
            for (int32_t block = 0; block < blocks_per_mcu(frame); ++block) {
                const int32_t component = block < frame.h * frame.v ? 0 : block - frame.h * frame.v + 1;
                const bool luma = component == 0;
                const int32_t block_x = luma ? mcu_x * frame.h + block % frame.h : mcu_x;
                const int32_t block_y = luma ? mcu_y * frame.v + block / frame.h : mcu_y;
                int32_t coefficients[kBlock] = {};
                if (luma && block_is_dummy(width, height, block_x, block_y)) {
                    coefficients[0] = previous[0];
                } else {
                    const int32_t h = luma ? 1 : frame.h, v = luma ? 1 : frame.v;
                    const Conversion to = conversion(component);
                    transform(
                        [&](int x, int y) {
                            return channels == 1
                                       ? grey_sample(pixels, width, height, block_x * 8 + x, block_y * 8 + y)
                                       : component_sample(pixels, width, height, to, h, v, block_x * 8 + x,
                                                          block_y * 8 + y);
                        },
                        divisors[luma ? 0 : 1], coefficients);
                }
                if (!add_block(scan, luma ? 0 : 1, coefficients[0] - previous[component], coefficients)) return -1;
                previous[component] = coefficients[0];
            }

    std::vector<uint8_t> file(kMaxHeader);
    uint8_t* at = file.data() + write_prefix(file.data(), frame, quality);
    const OneLane lane;
    uint32_t book[2 * kClassEntries] = {};
    static thread_local HuffmanScratch scratch;
    for (int table = 0; table < 2 * classes; ++table) {
        const int table_class = table / 2, kind = table % 2;
        const int first = table_class * kClassEntries + (kind ? 0 : kDcEntry);
        HuffmanTable code;
        if (optimize)
            optimal_table(lane, scan.histogram + first, kind ? 256 : 16, scratch, code);
        else
            standard_table(lane, table_class, kind, code);
        fill_book(lane, code, book + first);
        write_table_segment(lane, at, table_class, kind, code);
        at += table_segment_bytes(code);
    }
    at += write_scan_header(at, channels);
    file.resize((size_t)(at - file.data()));

    uint64_t bits = 0;
    int pending = 0;
    const auto flush = [&] {
        for (; pending >= 8; pending -= 8) {
            const uint8_t byte = (uint8_t)(bits >> (pending - 8));
            file.push_back(byte);
            if (byte == 0xFF) file.push_back(0);
        }
    };
    for (const uint32_t token : scan.tokens) {
        const uint32_t entry = book[token_entry(token)];
        if (entry == 0) return -2;
        bits = bits << book_length(entry) | token_bits(entry, token);
        pending += (int)book_length(entry);
        flush();
    }
    if (pending) {
        bits = bits << 7 | 0x7F;
        pending += 7;
        flush();
    }
    file.push_back(0xFF);
    file.push_back(0xD9);
    const int64_t size = (int64_t)file.size();
    memcpy(out, file.data(), (size_t)(size < capacity ? size : capacity));
    return size;
}

// What a decoder makes of encode()'s file: pixels (height, width, channels) -> out (height, width, channels)
extern "C" void reconstruct(const uint8_t* pixels, int32_t width, int32_t height, int32_t channels,
                            int32_t subsampling, int32_t quality, uint8_t* out) {
    const Frame frame = make_frame(width, height, channels, subsampling);
    std::vector<uint8_t> planes((size_t)all_planes_bytes(width, height, frame.h, frame.v));
    for (int component = 0; component < channels; ++component) {
        Divisor divisors[kBlock];
        for (int i = 0; i < kBlock; ++i) divisors[i] = make_divisor(quantum(component ? 1 : 0, i, quality));
        const int32_t h = component ? frame.h : 1, v = component ? frame.v : 1;
        const Conversion to = conversion(component);
        const Plane plane = plane_of(component, width, height, frame.h, frame.v);
        for (int32_t y = 0; y < plane.rows; y += kSide)
            for (int32_t x = 0; x < plane.columns; x += kSide) {
                int32_t coefficients[kBlock];
                transform(
                    [&](int column, int row) {
                        return channels == 1 ? grey_sample(pixels, width, height, x + column, y + row)
                                             : component_sample(pixels, width, height, to, h, v, x + column, y + row);
                    },
                    divisors, coefficients);
                inverse_transform(coefficients, divisors, planes.data() + plane.start + (size_t)y * plane.stride + x,
                                  plane.stride);
            }
    }
    if (channels == 1) {
        const int32_t stride = plane_of(0, width, height, 1, 1).stride;
        for (int32_t y = 0; y < height; ++y)
            memcpy(out + (size_t)y * width, planes.data() + (size_t)y * stride, (size_t)width);
    } else {
        const auto to_pixels = subsampling == 0 ? upsample<1, 1> : subsampling == 1 ? upsample<2, 1> : upsample<2, 2>;
        to_pixels(planes.data(), width, height, out);
    }
}

// histogram (n_symbols) uint32; lengths (17) uint8, [0] the number of symbols; symbols (192) uint8, in order of code;
// book (256) uint32, see jpeg.cuh
extern "C" void huffman(const uint32_t* histogram, int32_t n_symbols, uint8_t* lengths, uint8_t* symbols,
                        uint32_t* book) {
    static thread_local HuffmanScratch scratch;
    HuffmanTable table;
    memset(&table, 0, sizeof table);
    optimal_table(OneLane(), histogram, n_symbols, scratch, table);
    fill_book(OneLane(), table, book);
    memcpy(lengths, table.lengths, sizeof table.lengths);
    memcpy(symbols, table.symbols, sizeof table.symbols);
}

extern "C" int32_t quantised(int32_t value, int32_t step) { return quantise(value, make_divisor((uint32_t)step)); }
extern "C" uint32_t all_ones_bytes(uint32_t word) { return bytes_of_ones(word); }
extern "C" uint32_t component_of(int32_t component, uint32_t pixel) { return convert(pixel, conversion(component)); }
