// kernels/depth.cu on the CPU, one launcher an entry, for tests/test_depth_processing.py.
#include "cuda_arithmetic.h"
#include "cuda_emulator.h"

namespace depth_cu {
#define EMULATED_KERNEL "../../kernels/depth.cu"
#include "cuda_emulator.h"
}  // namespace depth_cu

extern "C" {

// The order of threads and blocks of the launches that follow.
void reorder(uint32_t seed) { emulator::random_order.seed(seed); }

// half: the entries for fp16; channels: 0 for NCHW; normalisation: scale of red, green, blue, then bias
void run_preprocess(int32_t half, int32_t n, int32_t blocks, const uint8_t* images, int32_t height, int32_t width,
                    int32_t input_height, int32_t input_width, int32_t channels, const float* normalisation,
                    void* inputs) {
    const float* v = normalisation;
    emulator::launch((unsigned)n, (unsigned)blocks, depth_cu::kPreThreads, [=] {
        if (half && !channels)
            depth_cu::depth_preprocess_nchw_half(images, height, width, input_height, input_width, v[0], v[1], v[2],
                                                 v[3], v[4], v[5], (uint16_t*)inputs);
        else if (half)
            depth_cu::depth_preprocess_nhwc_half(images, height, width, input_height, input_width, channels, v[0],
                                                 v[1], v[2], v[3], v[4], v[5], (uint16_t*)inputs);
        else if (!channels)
            depth_cu::depth_preprocess_nchw_float(images, height, width, input_height, input_width, v[0], v[1], v[2],
                                                  v[3], v[4], v[5], (float*)inputs);
        else
            depth_cu::depth_preprocess_nhwc_float(images, height, width, input_height, input_width, channels, v[0],
                                                  v[1], v[2], v[3], v[4], v[5], (float*)inputs);
    });
}

void run_postprocess(int32_t half, int32_t n, const void* predictions, int32_t prediction_height,
                     int32_t prediction_width, int32_t height, int32_t width, int32_t meaning, float scale,
                     uint8_t* grey, float* metres, float* range, int32_t* faults) {
    emulator::launch((unsigned)n, 1, depth_cu::kPostThreads, [=] {
        if (half)
            depth_cu::depth_postprocess_half((const uint16_t*)predictions, prediction_height, prediction_width,
                                             height, width, meaning, scale, grey, metres, range, faults);
        else
            depth_cu::depth_postprocess_float((const float*)predictions, prediction_height, prediction_width, height,
                                              width, meaning, scale, grey, metres, range, faults);
    });
}

// fp16 numbers as they are read, and floats as they are rounded, count of them
void convert(int64_t count, const uint16_t* bits, float* values, const float* floats, uint16_t* rounded) {
    for (int64_t i = 0; i < count; ++i) {
        values[i] = depth_cu::decode(bits[i]);
        depth_cu::encode(floats[i], rounded[i]);
    }
}
}
