// The loops of ops.cpp for CUDA: plain CUDA, no torch header (4 s for two architectures; 170 s with
// them).
//
// Nothing here waits for the device or allocates; there are no atomics, so results do not vary from
// run to run. Accesses are of 16 bytes where pointers and sizes allow, checked at run time. A label
// or an index out of range is never followed: its results are NaN.
#include <cuda_runtime.h>

#include "formulas.h"

namespace datadiet {
namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fc00000); }

template <class... Pointers>
bool aligned(size_t bytes, Pointers... p) {
  return (... && (reinterpret_cast<uintptr_t>(p) % bytes == 0));
}

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// ---- masked SGD ---------------------------------------------------------------------------------

// V weights a thread: four where all rows start on 16 bytes; a row of blocks for each row.
template <int V>
__global__ void __launch_bounds__(THREADS) sgd_kernel(const Sgd a) {
  const int64_t i = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * V;
  if (i >= a.columns) return;
  const float lr = a.lr[0];
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
    const int64_t at = row * a.columns + i;
    auto w = read_pack<V>(a.weights + at), m = read_pack<V>(a.momentum + at);
    const auto g = read_pack<V>(a.gradient + at);
    Pack<uint8_t, V> alive;
    if (i < a.prunable) {
      alive = read_pack<V>(a.mask + row * a.prunable + i);
    } else {
#pragma unroll
      for (int k = 0; k < V; ++k) alive.at[k] = 1;
    }
    Pack<bf16, V> rounded;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      sgd(w.at[k], m.at[k], g.at[k], alive.at[k] != 0, lr, a.mu, a.weight_decay);
      put(rounded.at[k], w.at[k]);
    }
    write_pack<V>(a.weights + at, w);
    write_pack<V>(a.momentum + at, m);
    write_pack<V>(a.gradient + at, {});
    if (a.weights_bf16) write_pack<V>(a.weights_bf16 + at, rounded);
  }
}

template <int V>
const char* launch_sgd(const Sgd& a, cudaStream_t stream) {
  const dim3 grid(unsigned(divide_up(a.columns, int64_t(V) * THREADS)),
                  unsigned(a.rows < 65535 ? a.rows : 65535));
  sgd_kernel<V><<<grid, THREADS, 0, stream>>>(a);
  return launched();
}

// ---- losses -------------------------------------------------------------------------------------

struct RowLosses {
  float loss, error, norm;
};

template <class T>
__device__ __forceinline__ T from_lane(T x, int offset) {
  return __shfl_xor_sync(0xffffffffu, x, offset);
}

// A row's losses, by LANES neighbouring threads, all of which get the result; all threads of a warp
// must come here together. The second pass finds the row in the L1 cache. A row past the end or a
// label out of range gives NaN.
template <int LANES>
__device__ __forceinline__ RowLosses losses_of(const float* logits, int64_t row, int64_t n,
                                               int classes, int64_t label) {
  const bool known = row < n && label >= 0 && label < classes;
  const float* const x = logits + (known ? row * classes : 0);
  const int from = threadIdx.x % LANES, to = known ? classes : 0;
  const float own = known ? x[label] : not_a_number();
  float top = -INFINITY, others = 0, squares = 0;
  int wrong = 0;
#pragma unroll 4
  for (int c = from; c < to; c += LANES) see_logit(x[c], own, c < label, top, wrong);
#pragma unroll
  for (int offset = LANES / 2; offset; offset /= 2) {
    const float other = from_lane(top, offset);
    top = other > top ? other : top;
    wrong |= from_lane(wrong, offset);
  }
#pragma unroll 4
  for (int c = from; c < to; c += LANES) add_logit(x[c], top, c == label, others, squares);
#pragma unroll
  for (int offset = LANES / 2; offset; offset /= 2) {  // a + b = b + a: all lanes get the same sum
    others += from_lane(others, offset);
    squares += from_lane(squares, offset);
  }
  RowLosses out;
  finish_row(top, own, others, squares, out.loss, out.norm);
  out.error = known ? float(wrong) : own;
  return out;
}

template <int LANES>
__global__ void __launch_bounds__(THREADS) losses_kernel(const Losses a) {
  const int64_t row = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / LANES;
  const int64_t label = row < a.n ? a.labels[row] : 0;
  const auto mine = losses_of<LANES>(a.logits, row, a.n, int(a.classes), label);
  if (row >= a.n || threadIdx.x % LANES) return;
  a.loss[row] = mine.loss;
  a.error[row] = mine.error;
  a.norm[row] = mine.norm;
}

template <int LANES>
__global__ void __launch_bounds__(THREADS) barrier_kernel(const Barrier a) {
  const int64_t row = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / LANES;
  const int64_t label = row < a.n ? a.labels[row] : 0;
  const auto first = losses_of<LANES>(a.first, row, a.n, int(a.classes), label);
  const auto second = losses_of<LANES>(a.second, row, a.n, int(a.classes), label);
  const auto middle = losses_of<LANES>(a.middle, row, a.n, int(a.classes), label);
  if (row >= a.n || threadIdx.x % LANES) return;
  a.loss[row] = barrier(middle.loss, first.loss, second.loss, a.alpha);
  a.error[row] = barrier(middle.error, first.error, second.error, a.alpha);
}

// Few classes: four rows a warp.
template <class Arguments>
const char* launch_rows(void (*few)(Arguments), void (*many)(Arguments), const Arguments& a,
                        void* stream) {
  const int lanes = a.classes <= 16 ? 8 : 32;
  const int64_t blocks = divide_up(a.n, THREADS / lanes);
  if (blocks > INT32_MAX) return "more rows than one launch takes";
  (lanes == 8 ? few : many)<<<unsigned(blocks), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return launched();
}

// ---- augmentation -------------------------------------------------------------------------------

// A block for each image of the batch.
template <class Out>
__global__ void __launch_bounds__(THREADS) augment_kernel(const Augment a) {
  const int64_t b = blockIdx.x;
  const int width = int(a.width), channels = int(a.channels);
  const int total = int(a.height) * width * channels;
  const bool known = a.indices[b] >= 0 && a.indices[b] < a.count;
  for (int64_t i = threadIdx.x; i < total; i += THREADS) {
    const int pixel = int(i) / channels, c = int(i) - pixel * channels, y = pixel / width;
    const uint8_t* const from = known ? source(a, b, y, pixel - y * width) : nullptr;
    const float value = normalise(from ? from[c] : 0, a.scale[c], a.shift[c]);
    put(static_cast<Out*>(a.out)[b * total + i], known ? value : not_a_number());
  }
}

template <class Out>
const char* launch_augment(const Augment& a, cudaStream_t stream) {
  augment_kernel<Out><<<unsigned(a.batch), THREADS, 0, stream>>>(a);
  return launched();
}

}  // namespace

// ---- entries ------------------------------------------------------------------------------------

const char* launch(const Sgd& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const bool packed = a.columns % 4 == 0 && a.prunable % 4 == 0 && aligned(4, a.mask) &&
                      aligned(8, a.weights_bf16) && aligned(16, a.weights, a.momentum, a.gradient);
  return packed ? launch_sgd<4>(a, s) : launch_sgd<1>(a, s);
}

const char* launch(const Losses& a, void* stream) {
  return launch_rows(losses_kernel<8>, losses_kernel<32>, a, stream);
}

const char* launch(const Barrier& a, void* stream) {
  return launch_rows(barrier_kernel<8>, barrier_kernel<32>, a, stream);
}

const char* launch(const Augment& a, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return a.is_bf16 ? launch_augment<bf16>(a, s) : launch_augment<float>(a, s);
}

}  // namespace datadiet

#include "batch_norm.cuh"
