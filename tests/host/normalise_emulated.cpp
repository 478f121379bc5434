// kernels/normalise.cu on the CPU, for tests/test_normalise.py.
#include "cuda_arithmetic.h"
#include "cuda_emulator.h"

namespace normalise_cu {
#define EMULATED_KERNEL "../../kernels/normalise.cu"
#include "cuda_emulator.h"
}  // namespace normalise_cu

extern "C" {

// planes: NCHW, else NHWC; type: 0 float32, 1 float16, 2 bfloat16; v: scale of red, green, blue, then bias
void run_normalise(int32_t planes, int32_t type, int32_t n, int32_t blocks, const uint8_t* images, int32_t pixels,
                   const float* v, void* out) {
    using namespace normalise_cu;
    const auto launch = [=](const auto& kernel, auto* to) {
        emulator::launch((unsigned)blocks, n < 2 ? 1u : 2u, kThreads,  // with three pictures, a block takes two
                         [=] { kernel(images, n, pixels, v[0], v[1], v[2], v[3], v[4], v[5], to); });
    };
    if (type == 0)
        launch(planes ? normalise_nchw_float32 : normalise_nhwc_float32, (float*)out);
    else if (type == 1)
        launch(planes ? normalise_nchw_float16 : normalise_nhwc_float16, (Fp16*)out);
    else
        launch(planes ? normalise_nchw_bfloat16 : normalise_nhwc_bfloat16, (Bf16*)out);
}

}  // extern "C"
