// Runs ops.cu on the CPU: the threads of a block are fibers that take turns, blocks follow each
// other. A launch is shim::launch(grid, threads, kernel call), written so by the test.
#pragma once
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
struct uint4 {
  uint32_t x, y, z, w;
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

inline dim3 block, grid, block_size;
inline unsigned current;
inline float lanes[4096];
inline int waiting, alive, generation;
inline ucontext_t host;
inline std::vector<ucontext_t> fibers;
inline std::vector<bool> done;
inline std::function<void()> kernel;

struct ThreadIndex {
  struct X {
    operator unsigned() const { return current; }
  } x;
};

inline void yield() { swapcontext(&fibers[current], &host); }

inline void barrier() {
  const int mine = generation;
  if (++waiting == alive) waiting = 0, ++generation;
  while (generation == mine) yield();
}

inline void body() {
  kernel();
  done[current] = true;
  --alive;
  if (alive && waiting == alive) waiting = 0, ++generation;
  swapcontext(&fibers[current], &host);
}

inline void launch(dim3 blocks, unsigned threads, const std::function<void()>& call) {
  constexpr size_t STACK = 128 << 10;
  static std::vector<char> stacks;
  stacks.resize(threads * STACK);
  kernel = call;
  grid = blocks;
  block_size = dim3(threads);
  for (block.y = 0; block.y < grid.y; ++block.y)
    for (block.x = 0; block.x < grid.x; ++block.x) {
      fibers.assign(threads, {});
      done.assign(threads, false);
      alive = int(threads), waiting = 0;
      for (unsigned t = 0; t < threads; ++t) {
        getcontext(&fibers[t]);
        fibers[t].uc_stack.ss_sp = stacks.data() + t * STACK;
        fibers[t].uc_stack.ss_size = STACK;
        fibers[t].uc_link = &host;
        makecontext(&fibers[t], body, 0);
      }
      while (alive)
        for (current = 0; current < threads; ++current)
          if (!done[current]) swapcontext(&host, &fibers[current]);
    }
}

}  // namespace shim

inline shim::ThreadIndex threadIdx;
#define blockIdx shim::block
#define gridDim shim::grid
#define blockDim shim::block_size

inline void __syncthreads() { shim::barrier(); }
inline float __int_as_float(int x) {
  float y;
  memcpy(&y, &x, sizeof y);
  return y;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __shfl_xor_sync(unsigned, T x, int offset) {  // all threads of the block must come here
  T y;
  memcpy(&shim::lanes[shim::current], &x, sizeof x);
  shim::barrier();
  memcpy(&y, &shim::lanes[shim::current ^ unsigned(offset)], sizeof y);
  shim::barrier();
  return y;
}
