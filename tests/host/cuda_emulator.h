// Runs CUDA kernels on the CPU, unmodified, so that their own code is tested on machines without a GPU.
//
// Each thread of a block is a fiber on one processor thread; it runs until it waits at a barrier (__syncthreads,
// __syncwarp, or the exchange inside of a warp intrinsic), so nothing is ever concurrent. What finds mistakes is the
// order: blocks run one after another in random order, and between two barriers so do the threads of a block. A
// result that needs an order that no barrier ensures then differs from launch to launch, and a barrier that some
// threads never reach is a deadlock, told as such.
//
// What it is not: a model of memory. Reads and writes take effect at once, shared memory keeps what the last block
// left there, and addresses out of bounds show only in what the caller puts around its arrays. It has what
// kernels/*.cu use: one-dimensional blocks, grids of two dimensions, intrinsics over full warps.
//
// To use it, include this file, then once more for each kernel file:
//     #define EMULATED_KERNEL "../../kernels/moments.cu"
//     #include "cuda_emulator.h"
// and call emulator::launch(grid_x, grid_y, block, [&] { moments(...); }).
#if defined(EMULATED_KERNEL)

// Warnings of kernel files are nvcc's to give; GCC would stop at `#pragma unroll`, and before version 13 it heeds no
// `diagnostic ignored` for it. What a system header includes is silent.
#pragma GCC system_header
#include EMULATED_KERNEL
#undef EMULATED_KERNEL

#elif !defined(GPUFGBG_CUDA_EMULATOR)
#define GPUFGBG_CUDA_EMULATOR

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// -------------------------------------------------------------------------------------------------------------------
// Words of the language

#define __CUDA_ARCH__ 900
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)

struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulator {

struct Dimensions {
    unsigned x, y, z;
};
inline Dimensions thread_index, block_index, block_size, grid_size;

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

// -------------------------------------------------------------------------------------------------------------------
// Fibers

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;

[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "cuda_emulator: %s (block %u, %u)\n", what, block_index.x, block_index.y);
    abort();
}

#if defined(__x86_64__)

// A context is a stack pointer; what a call preserves is on the stack. ucontext would do, with two system calls a
// switch.
using Context = void*;
extern "C" void cuda_emulator_switch(Context* save, Context* load);
asm(R"(
.pushsection .text
.globl cuda_emulator_switch
.hidden cuda_emulator_switch
.type cuda_emulator_switch, @function
cuda_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_emulator_switch, . - cuda_emulator_switch
.popsection
)");
inline void switch_context(Context& save, Context& load) { cuda_emulator_switch(&save, &load); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
    void** top = (void**)(((uintptr_t)stack + kStackBytes) & ~(uintptr_t)15);
    *--top = nullptr;  // where entry would return to
    *--top = (void*)entry;
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers that a switch pops
    context = top;
}

#else

using Context = ucontext_t;
inline void switch_context(Context& save, Context& load) { swapcontext(&save, &load); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}

#endif

struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack;
    bool done;
};

struct Barrier {
    unsigned arrived = 0, generation = 0;
};

inline std::mt19937 random_order{1};
inline std::vector<Fiber> fibers;
inline Context scheduler;
inline unsigned running;   // thread of the block
inline uint64_t progress;  // counts what threads get done: none in a whole round is a deadlock
inline const std::function<void()>* kernel;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline uint64_t exchanged[1024 / kWarp][kWarp];

inline void pause() { switch_context(fibers[running].context, scheduler); }

inline void run_thread() {
    (*kernel)();
    fibers[running].done = true;
    ++progress;
    pause();
    fail("a thread ran on after its end");
}

inline void wait(Barrier& barrier, unsigned expected) {
    const unsigned generation = barrier.generation;
    ++progress;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
    } else {
        while (barrier.generation == generation) pause();
    }
}

inline void run_block(unsigned threads) {
    block_barrier = {};
    warp_barriers.assign((threads + kWarp - 1) / kWarp, {});
    std::vector<unsigned> alive(threads);
    for (unsigned t = 0; t < threads; ++t) {
        alive[t] = t;
        if (!fibers[t].stack) fibers[t].stack.reset(new char[kStackBytes]);
        fibers[t].done = false;
        make_context(fibers[t].context, fibers[t].stack.get(), run_thread);
    }
    std::shuffle(alive.begin(), alive.end(), random_order);
    while (!alive.empty()) {
        const uint64_t before = progress;
        if (random_order() % 2) std::reverse(alive.begin(), alive.end());
        for (const unsigned t : alive) {
            running = t;
            thread_index = {t, 0, 0};
            switch_context(scheduler, fibers[t].context);
        }
        if (progress == before) fail("deadlock: some threads wait at a barrier that the others don't reach");
        alive.erase(std::remove_if(alive.begin(), alive.end(), [](unsigned t) { return fibers[t].done; }),
                    alive.end());
    }
}

// kernel<<<(grid_x, grid_y), threads>>>: call() is the kernel's call.
template <class Call>
void launch(unsigned grid_x, unsigned grid_y, unsigned threads, const Call& call) {
    if (threads % kWarp || threads == 0 || threads > 1024) fail("blocks are 1 to 32 whole warps");
    const std::function<void()> wrapped = call;
    kernel = &wrapped;
    block_size = {threads, 1, 1};
    grid_size = {grid_x, grid_y, 1};
    if (fibers.size() < threads) fibers.resize(threads);
    std::vector<unsigned> blocks((size_t)grid_x * grid_y);
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = (unsigned)i;
    std::shuffle(blocks.begin(), blocks.end(), random_order);
    for (const unsigned block : blocks) {
        block_index = {block % grid_x, block / grid_x, 0};
        run_block(threads);
    }
}

inline unsigned lane() { return running % kWarp; }
inline void sync_warp() { wait(warp_barriers[running / kWarp], kWarp); }

// What every lane of the warp gave, until the next sync_warp().
inline const uint64_t* exchange(uint32_t lanes, uint64_t value) {
    if (lanes != 0xFFFFFFFFu) fail("a warp intrinsic over a part of the warp");
    uint64_t* values = exchanged[running / kWarp];
    values[lane()] = value;
    sync_warp();
    return values;
}

// Shuffles: the value of lane source(own lane).
template <class T, class Source>
T shuffle(uint32_t lanes, T value, const Source& source) {
    const T result = (T)exchange(lanes, (uint64_t)value)[source(lane())];
    sync_warp();
    return result;
}

// Reductions: all lanes' values, joined.
template <class T, class Join>
T reduce(uint32_t lanes, T value, T start, const Join& join) {
    const uint64_t* values = exchange(lanes, (uint64_t)value);
    for (unsigned i = 0; i < kWarp; ++i) start = join(start, (T)values[i], i);
    sync_warp();
    return start;
}

}  // namespace emulator

// -------------------------------------------------------------------------------------------------------------------
// Intrinsics, as the CUDA C++ programming guide defines them

inline void __syncthreads() { emulator::wait(emulator::block_barrier, emulator::block_size.x); }
inline void __syncwarp() { emulator::sync_warp(); }

template <class T>
T __shfl_sync(uint32_t lanes, T value, unsigned lane) {
    return emulator::shuffle(lanes, value, [=](unsigned) { return lane % 32; });
}
template <class T>
T __shfl_up_sync(uint32_t lanes, T value, unsigned delta) {
    return emulator::shuffle(lanes, value, [=](unsigned own) { return own >= delta ? own - delta : own; });
}
template <class T>
T __shfl_xor_sync(uint32_t lanes, T value, unsigned mask) {
    return emulator::shuffle(lanes, value, [=](unsigned own) { return own ^ mask; });
}
inline uint32_t __ballot_sync(uint32_t lanes, int value) {
    return emulator::reduce<uint32_t>(lanes, value != 0, 0,
                                      [](uint32_t a, uint32_t v, unsigned i) { return a | v << i; });
}
inline uint32_t __match_any_sync(uint32_t lanes, uint32_t value) {
    return emulator::reduce<uint32_t>(
        lanes, value, 0, [=](uint32_t a, uint32_t v, unsigned i) { return a | (uint32_t)(v == value) << i; });
}
inline uint32_t __reduce_add_sync(uint32_t lanes, uint32_t value) {
    return emulator::reduce<uint32_t>(lanes, value, 0, [](uint32_t a, uint32_t v, unsigned) { return a + v; });
}
inline uint32_t __reduce_min_sync(uint32_t lanes, uint32_t value) {
    return emulator::reduce(lanes, value, value, [](uint32_t a, uint32_t v, unsigned) { return std::min(a, v); });
}
inline int32_t __reduce_max_sync(uint32_t lanes, int32_t value) {
    return emulator::reduce(lanes, value, value, [](int32_t a, int32_t v, unsigned) { return std::max(a, v); });
}

template <class T>
T atomicAdd(T* at, T value) {
    const T old = *at;
    *at += value;
    return old;
}
inline uint32_t atomicOr(uint32_t* at, uint32_t value) {
    const uint32_t old = *at;
    *at |= value;
    return old;
}

template <class T>
T __ldg(const T* at) {
    if ((uintptr_t)at % sizeof(T)) emulator::fail("a load from an address that is not aligned");
    return *at;
}
template <class T>
void __stcs(T* at, T value) {
    if ((uintptr_t)at % sizeof(T)) emulator::fail("a store to an address that is not aligned");
    *at = value;
}

inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint32_t)(((uint64_t)a * b) >> 32); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return (uint32_t)(((uint64_t)high << 32 | low) >> (shift & 31));
}
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) {
    for (int shift = 0; shift < 32; shift += 8) c += ((a >> shift) & 255u) * ((b >> shift) & 255u);
    return c;
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = (uint64_t)high << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t choice = (selector >> (4 * i)) & 15u;
        uint32_t byte = (uint32_t)(bytes >> (8 * (choice & 7u))) & 255u;
        if (choice & 8u) byte = byte & 128u ? 255u : 0u;  // the byte's sign
        result |= byte << (8 * i);
    }
    return result;
}

#endif
