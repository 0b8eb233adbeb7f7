// Runs ops.cu on the CPU: the threads of a block are fibers that take turns, blocks follow each
// other. A launch is shim::launch(grid, threads, kernel call), written so by the test.
#pragma once
#include <sanitizer/asan_interface.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
typedef void* cudaStream_t;
typedef int cudaError_t;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

namespace shim {

inline dim3 block, grid;
inline unsigned current, threads;
inline float lanes[2][512];
inline unsigned waiting, alive, generation;
inline ucontext_t host;
inline std::vector<ucontext_t> fibers;
inline std::vector<bool> done;
inline std::function<void()> kernel;

struct ThreadIndex {
  struct X {
    operator unsigned() const { return current; }
  } x;
};

inline void next_fiber() {
  const unsigned from = current;
  if (!alive) setcontext(&host);
  do current = (current + 1) % threads;
  while (done[current]);
  if (current != from) swapcontext(&fibers[from], &fibers[current]);
}

inline void release() {
  if (waiting == alive) waiting = 0, ++generation;
}

inline void barrier() {
  const unsigned mine = generation;
  ++waiting;
  release();
  while (generation == mine) next_fiber();
}

inline void body() {
  kernel();
  done[current] = true;
  --alive;
  release();
  next_fiber();
}

inline void launch(dim3 blocks, unsigned size, const std::function<void()>& call) {
  constexpr size_t STACK = 64 << 10;
  static std::vector<char> stacks(512 * STACK);
  __asan_unpoison_memory_region(stacks.data(), stacks.size());  // fibers do not return
  kernel = call;
  grid = blocks;
  threads = size;
  for (block.y = 0; block.y < grid.y; ++block.y)
    for (block.x = 0; block.x < grid.x; ++block.x) {
      fibers.assign(threads, {});
      done.assign(threads, false);
      alive = threads, waiting = current = 0;
      for (unsigned t = 0; t < threads; ++t) {
        getcontext(&fibers[t]);
        fibers[t].uc_stack.ss_sp = stacks.data() + t * STACK;
        fibers[t].uc_stack.ss_size = STACK;
        makecontext(&fibers[t], body, 0);
      }
      swapcontext(&host, &fibers[0]);
    }
}

}  // namespace shim

inline shim::ThreadIndex threadIdx;
#define blockIdx shim::block
#define gridDim shim::grid

inline void __syncthreads() { shim::barrier(); }
inline float __int_as_float(int x) {
  float y;
  memcpy(&y, &x, sizeof y);
  return y;
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int offset) {  // all threads of the block must come here
  float* const mine = shim::lanes[shim::generation % 2];  // the other half may still be read
  memcpy(&mine[shim::current], &x, sizeof x);
  shim::barrier();
  memcpy(&x, &mine[shim::current ^ unsigned(offset)], sizeof x);
  return x;
}
