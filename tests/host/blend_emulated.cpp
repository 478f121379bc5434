// kernels/composite.cu with blends of a user's own, the twins of those in tests/test_user_blend.py.
#define GPUFGBG_USER_BLEND
#include "kernels_emulated.cpp"

namespace {

int32_t chosen;

int32_t pillow(int32_t fg, int32_t bg, int32_t alpha) {
    const int32_t v = bg * (255 - alpha) + fg * alpha + 128;
    return (v + (v >> 8)) >> 8;
}

int32_t multiply(int32_t fg, int32_t bg, int32_t alpha) {
    return (255 * bg * (255 - alpha) + bg * fg * alpha) / 65025;
}

int32_t feather(int32_t fg, int32_t bg, int32_t alpha) {
    if (alpha < 64) return bg;
    const int32_t by = std::min((alpha - 64) * 2, 255);
    return (bg * (255 - by) + fg * by + 127) / 255;
}

// A lamp at (20, 10) of radius 16.
int32_t lamp(int32_t fg, int32_t bg, int32_t alpha, int32_t x, int32_t y) {
    const int32_t distance = (x - 20) * (x - 20) + (y - 10) * (y - 10);
    return pillow(fg, bg, alpha * std::max(256 - distance, 0) / 256);
}

int32_t overflowing(int32_t fg, int32_t bg, int32_t alpha, int32_t x) { return 3 * (fg + bg) - 2 * alpha - x; }

int32_t dividing(int32_t fg, int32_t bg, int32_t alpha) {
    const double part = alpha / 255.0;
    volatile const double over = fg * part, under = bg * (1.0 - part);  // rounded, not joined with the addition
    return (int32_t)(over + under + 0.5);
}

}  // namespace

extern "C" {

void choose_blend(int32_t blend) { chosen = blend; }

int32_t gpufgbg_blend(int32_t fg, int32_t bg, int32_t alpha, int32_t x, int32_t y) {
    const int32_t value = chosen == 0   ? pillow(fg, bg, alpha)
                          : chosen == 1 ? multiply(fg, bg, alpha)
                          : chosen == 2 ? feather(fg, bg, alpha)
                          : chosen == 3 ? lamp(fg, bg, alpha, x, y)
                          : chosen == 4 ? overflowing(fg, bg, alpha, x)
                                        : dividing(fg, bg, alpha);
    return value < 0 ? 0 : value > 255 ? 255 : value;
}
}
