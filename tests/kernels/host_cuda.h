// Enough of CUDA to run a kernel's source on the CPU: blocks one after the other, a block's threads as coroutines that
// change at barriers and warp exchanges. Included before the kernel's source; see host_device.py.
//
// Thread order is ascending or, on request, descending: a missing barrier then shows as a different result. A barrier
// that some threads of a block skip, or a warp exchange without its whole warp, ends the launch with an error.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __constant__ static
#define __shared__ static
#define __forceinline__ static inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct float2 {
    float x, y;
};

struct Index3 {
    int x, y, z;
};
static Index3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

namespace {
namespace host_cuda {

constexpr int MAX_THREADS = 1024, STACK_BYTES = 64 * 1024, WARP = 32;
enum State { READY, AT_BARRIER, AT_EXCHANGE, DONE };
enum Failure { NO_FAILURE, WRONG_ARGUMENTS, SKIPPED_BARRIER, TOO_MANY_THREADS };

struct Thread {
    ucontext_t start;
    jmp_buf resume;
    char* stack = nullptr;
    State state = DONE;
    Index3 index{};
    int exchanges = 0;
};

static Thread threads[MAX_THREADS];
static Thread* running;
static jmp_buf scheduler;
static unsigned exchanged[2][MAX_THREADS];
static void (*body)(void*);
static void* body_argument;

__attribute__((noinline)) void wait(State state)
{
    running->state = state;
    if (!_setjmp(running->resume)) _longjmp(scheduler, 1);
}

inline void thread_main()
{
    for (;;) {
        body(body_argument);
        wait(DONE);
    }
}

inline void resume(Thread& thread)
{
    running = &thread;
    threadIdx = thread.index;
    if (_setjmp(scheduler)) return;
    if (thread.stack) _longjmp(thread.resume, 1);
    thread.stack = static_cast<char*>(std::malloc(STACK_BYTES));
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack;
    thread.start.uc_stack.ss_size = STACK_BYTES;
    makecontext(&thread.start, thread_main, 0);
    setcontext(&thread.start);
}

inline bool all_are(State state, const Thread* begin, const Thread* end)
{
    return std::all_of(begin, end, [state](const Thread& thread) { return thread.state == state; });
}

// Runs a warp as far as it gets without the others: the schedule that a missing barrier bears least.
inline void run_warp(Thread* begin, Thread* end, bool descending)
{
    for (;;) {
        const int count = end - begin;
        for (int i = 0; i < count; ++i) {
            Thread& thread = begin[descending ? count - 1 - i : i];
            if (thread.state == READY) resume(thread);
        }
        if (!all_are(AT_EXCHANGE, begin, end)) return;
        for (Thread* thread = begin; thread != end; ++thread) thread->state = READY;
    }
}

inline Failure run_block(int count, bool descending)
{
    for (int i = 0; i < count; ++i) {
        threads[i].state = READY;
        threads[i].exchanges = 0;
        threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    }
    const int warps = (count + WARP - 1) / WARP;
    for (;;) {
        for (int i = 0; i < warps; ++i) {
            const int first = (descending ? warps - 1 - i : i) * WARP;
            run_warp(threads + first, threads + min(first + WARP, count), descending);
        }
        if (all_are(DONE, threads, threads + count)) return NO_FAILURE;
        if (!all_are(AT_BARRIER, threads, threads + count)) {
            for (int i = 0; i < count; ++i)  // coroutines that cannot go on are forgotten
                if (threads[i].state != DONE) threads[i].stack = nullptr;
            return SKIPPED_BARRIER;
        }
        for (int i = 0; i < count; ++i) threads[i].state = READY;
    }
}

// The values that the calling thread's warp passes, by lane.
inline const unsigned* exchange(unsigned value)
{
    // two buffers: a fast thread may pass its next value while a slow one still reads the last
    const int buffer = running->exchanges++ % 2, thread = running - threads;
    exchanged[buffer][thread] = value;
    wait(AT_EXCHANGE);
    return exchanged[buffer] + thread / WARP * WARP;
}

inline int lane()
{
    return (running - threads) % WARP;
}

template <class To, class From>
inline To bits_as(From from)
{
    static_assert(sizeof(To) == sizeof(From), "only equal sizes share bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class... Parameters, std::size_t... Positions>
inline void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<Positions...>)
{
    kernel(*static_cast<std::remove_cv_t<Parameters>*>(arguments[Positions])...);
}

// Runs all blocks; arguments are addresses of values, whose sizes are checked against the kernel's parameters.
template <class... Parameters>
inline int launch(void (*kernel)(Parameters...), const int* grid, const int* block, int descending, int argument_count,
                  void** arguments, const int* argument_sizes)
{
    const int sizes[] = {static_cast<int>(sizeof(Parameters))...};
    if (argument_count != sizeof...(Parameters) || !std::equal(sizes, sizes + argument_count, argument_sizes))
        return WRONG_ARGUMENTS;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    const int count = block[0] * block[1] * block[2];
    if (count > MAX_THREADS) return TOO_MANY_THREADS;
    auto run = [&] { call(kernel, arguments, std::index_sequence_for<Parameters...>()); };
    body = [](void* argument) { (*static_cast<decltype(run)*>(argument))(); };
    body_argument = &run;
    for (int z = 0; z < grid[2]; ++z)
        for (int y = 0; y < grid[1]; ++y)
            for (int x = 0; x < grid[0]; ++x) {
                blockIdx = {x, y, z};
                if (Failure failure = run_block(count, descending)) return failure;
            }
    return NO_FAILURE;
}

}  // namespace host_cuda
}  // namespace

inline void __syncthreads()
{
    host_cuda::wait(host_cuda::AT_BARRIER);
}

inline unsigned __ballot_sync(unsigned, bool vote)
{
    const unsigned* votes = host_cuda::exchange(vote);
    unsigned ballot = 0;
    for (int lane = 0; lane < host_cuda::WARP; ++lane) ballot |= votes[lane] << lane;
    return ballot;
}

template <class T>
inline T __shfl_sync(unsigned, T value, int source)
{
    return host_cuda::bits_as<T>(host_cuda::exchange(host_cuda::bits_as<unsigned>(value))[source % host_cuda::WARP]);
}

template <class T>
inline T __shfl_up_sync(unsigned, T value, int distance)
{
    const unsigned* values = host_cuda::exchange(host_cuda::bits_as<unsigned>(value));
    const int source = host_cuda::lane() - distance;
    return source < 0 ? value : host_cuda::bits_as<T>(values[source]);
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned __float_as_uint(float value) { return host_cuda::bits_as<unsigned>(value); }

// A block's threads run one at a time, so plain operations are atomic.
template <class T>
inline T atomicAdd(T* address, T value) { return std::exchange(*address, *address + value); }
template <class T, class U>
inline T atomicAdd(T* address, U value) { return std::exchange(*address, *address + static_cast<T>(value)); }
inline unsigned atomicAnd(unsigned* address, unsigned value) { return std::exchange(*address, *address & value); }

inline float half_to_float(unsigned short bits) { return static_cast<float>(host_cuda::bits_as<_Float16>(bits)); }
inline unsigned short float_to_half(float value) { return host_cuda::bits_as<unsigned short>(static_cast<_Float16>(value)); }
