// BatchNorm, residual and ReLU on a card, a part of ops.cu: two launches each way.
//
// The first gives each block's sums; in the second every block adds up those of its channels, in
// the same order, and applies them: no atomics. A block spans up to 16 packs of V channels, a
// thread one of them; the threads after that take the pixels that follow.
#include "batch_norm.h"

namespace datadiet {
namespace {

constexpr int NORM_THREADS = 512, PACKS = 16, SEGMENTS = 32;

struct Place {  // of this thread
  int packs, rows, row;    // packs and rows of the block
  int64_t first, channel;  // of the block, of the thread
  bool active;
};

template <int V>
__device__ __forceinline__ Place place(int64_t channels) {
  Place p;
  const int64_t all = channels / V;
  p.packs = int(all < PACKS ? all : PACKS);
  p.rows = NORM_THREADS / p.packs;
  p.row = threadIdx.x / p.packs;
  p.first = int64_t(blockIdx.y) * PACKS * V;
  p.channel = p.first + threadIdx.x % p.packs * V;
  p.active = p.row < p.rows && p.channel < all * V;
  return p;
}

// Adds up `count` rows of sums, `pitch` apart, for the block's `width` channels; the sums of
// channel c are returned to thread c. `valid` of the channels exist.
__device__ __forceinline__ Sums fold(const Sums* rows, int count, int64_t pitch, int width,
                                     int valid, Sums* scratch) {
  const int fit = NORM_THREADS / width, segments = fit < SEGMENTS ? fit : SEGMENTS;
  const int c = threadIdx.x % width, segment = threadIdx.x / width;
  Sums sum = {0, 0};
  if (segment < segments) {
    if (c < valid)
#pragma unroll 4
      for (int i = segment; i < count; i += segments) sum.add(rows[i * pitch + c]);
    scratch[segment * width + c] = sum;
  }
  __syncthreads();
  if (threadIdx.x < width) {
    sum = scratch[threadIdx.x];
    for (int s = 1; s < segments; ++s) sum.add(scratch[s * width + threadIdx.x]);
  }
  return sum;
}

// Adds to `sums` up to a.AHEAD pixels, `step` apart; all are read before the first is used. What
// would lie past the end is read from the first pixel instead, and not added.
template <class T, int V>
__device__ __forceinline__ void add_pixels(const BatchNorm& a, const Channel<Block<float, V>>&,
                                           int64_t i, int64_t step, int64_t c, Sums (&sums)[V]) {
  Block<float, V> x[BatchNorm::AHEAD], shift, e, q;
  int n = 0;
#pragma unroll
  for (int u = 0; u < a.AHEAD; ++u) {
    const bool inside = i + u * step < a.pixels;
    n += inside;
    const int64_t at = (inside ? i + u * step : i) * a.channels + c;
    x[u] = Block<float, V>(static_cast<const T*>(a.x) + at);
  }
#pragma unroll
  for (int u = 0; u < a.AHEAD; ++u)
    if (u < n) shift = shift + x[u];
  for (int v = 0; v < V; ++v) shift.at[v] /= float(n);
#pragma unroll
  for (int u = 0; u < a.AHEAD; ++u)
    if (u < n) {
      const auto d = x[u] - shift;
      e = e + d;
      q = q + d * d;
    }
  for (int v = 0; v < V; ++v) sums[v].add(moments(n, shift.at[v], e.at[v], q.at[v]));
}

template <class T, int V>
__device__ __forceinline__ void add_pixels(const BatchNormBackward& a,
                                           const Channel<Block<float, V>>& channel, int64_t i,
                                           int64_t step, int64_t c, Sums (&sums)[V]) {
  typedef Block<float, V> B;
  constexpr int AHEAD = BatchNormBackward::AHEAD;
  B g[AHEAD], x[AHEAD], y[AHEAD], first, second;
#pragma unroll
  for (int u = 0; u < a.AHEAD; ++u) {
    const int64_t at = (i + u * step < a.pixels ? i + u * step : i) * a.channels + c;
    g[u] = B(static_cast<const T*>(a.dy) + at);
    x[u] = B(static_cast<const T*>(a.x) + at);
    if (a.y) y[u] = B(static_cast<const T*>(a.y) + at);
  }
#pragma unroll
  for (int u = 0; u < a.AHEAD; ++u)
    if (i + u * step < a.pixels)
      add<T>(a, channel, g[u], x[u], y[u], (i + u * step) * a.channels + c, first, second);
  for (int v = 0; v < V; ++v) sums[v].add({first.at[v], second.at[v]});
}

// Channel v of a thread is of(v).
template <int V, class Of>
__device__ __forceinline__ Channel<Block<float, V>> gather(const Of& of) {
  Channel<Block<float, V>> all;
  for (int v = 0; v < V; ++v) {
    const Channel<float> c = of(v);
    all.mean.at[v] = c.mean, all.scale.at[v] = c.scale, all.bias.at[v] = c.bias;
    all.offset.at[v] = c.offset, all.slope.at[v] = c.slope;
  }
  return all;
}

template <int V, class T, class Arguments>
__global__ void __launch_bounds__(NORM_THREADS) sums_kernel(const Arguments a) {
  __shared__ Sums rows[NORM_THREADS * V], scratch[NORM_THREADS];
  const Place p = place<V>(a.channels);
  Sums mine[V] = {};
  if (p.active) {
    const auto channel = gather<V>([&](int v) { return start(a, p.channel + v); });
    const int64_t step = int64_t(gridDim.x) * p.rows;
    for (int64_t i = int64_t(blockIdx.x) * p.rows + p.row; i < a.pixels; i += step * a.AHEAD)
      add_pixels<T>(a, channel, i, step, p.channel, mine);
  }
  const int width = p.packs * V;
  if (p.row < p.rows)
#pragma unroll
    for (int v = 0; v < V; ++v) rows[threadIdx.x * V + v] = mine[v];
  __syncthreads();
  const Sums sums = fold(rows, p.rows, width, width, width, scratch);
  const int64_t c = p.first + threadIdx.x;
  if (threadIdx.x < width && c < a.channels) a.partial[blockIdx.x * a.channels + c] = sums;
}

// Two blocks a multiprocessor: for a third ptxas would spill.
template <int V, class T, class Arguments>
__global__ void __launch_bounds__(NORM_THREADS, 2)
    apply_kernel(const Arguments a, const int count) {
  __shared__ Sums scratch[NORM_THREADS];
  __shared__ Channel<float> shared[PACKS * V];
  const Place p = place<V>(a.channels);
  const int64_t left = a.channels - p.first;
  const int width = p.packs * V, have = int(left < width ? left : width);
  const Sums sums = fold(a.partial + p.first, count, a.channels, width, have, scratch);
  if (threadIdx.x < have)
    shared[threadIdx.x] = finish(a, p.first + threadIdx.x, sums, blockIdx.x == 0);
  __syncthreads();
  if (!p.active) return;
  const Channel<float>* const mine = shared + threadIdx.x % p.packs * V;
  const auto channel = gather<V>([&](int v) { return mine[v]; });
  const int64_t step = int64_t(gridDim.x) * p.rows;
#pragma unroll 4
  for (int64_t i = int64_t(blockIdx.x) * p.rows + p.row; i < a.pixels; i += step)
    apply<T>(a, channel, i * a.channels + p.channel);
}

// Of both launches; the second could take more, but each of its blocks reads all partial sums.
template <int V>
dim3 norm_grid(int64_t pixels, int64_t channels, int64_t most) {
  const int64_t packs = channels / V, wide = packs < PACKS ? packs : PACKS;
  const int64_t rows = NORM_THREADS / wide, parts = divide_up(pixels, rows * BatchNorm::AHEAD);
  return dim3(unsigned(parts < most ? parts : most), unsigned(divide_up(packs, PACKS)));
}

template <int V, class T, class Arguments>
const char* launch_both(const Arguments& a, cudaStream_t stream) {
  const dim3 first = norm_grid<V>(a.pixels, a.channels, PARTS);
  const dim3 second = norm_grid<V>(a.pixels, a.channels, 4 * PARTS);
  sums_kernel<V, T><<<first, NORM_THREADS, 0, stream>>>(a);
  apply_kernel<V, T><<<second, NORM_THREADS, 0, stream>>>(a, int(first.x));
  return launched();
}

template <class Arguments>
const char* launch_norm(const Arguments& a, bool aligned_all, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.channels > int64_t(PACKS) * 65535) return "more channels than one launch takes";
  if (a.channels % 4 == 0 && aligned_all)
    return a.half ? launch_both<4, bf16>(a, s) : launch_both<4, float>(a, s);
  return a.half ? launch_both<1, bf16>(a, s) : launch_both<1, float>(a, s);
}

}  // namespace

const char* launch(const BatchNorm& a, void* stream) {
  return launch_norm(a, aligned(16, a.x, a.residual, a.y), stream);
}

const char* launch(const BatchNormBackward& a, void* stream) {
  return launch_norm(a, aligned(16, a.dy, a.x, a.y, a.dx, a.dresidual), stream);
}

}  // namespace datadiet
