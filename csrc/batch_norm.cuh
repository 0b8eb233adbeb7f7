// BatchNorm, residual and ReLU on a card, a part of ops.cu: two launches each way.
//
// The first gives each block's sums; in the second every block adds up those of its channels, in
// the same order, and applies them: no atomics. A block spans up to 16 packs of V channels, a
// thread one of them; the threads after that take the pixels that follow.
#include "batch_norm.h"

namespace datadiet {
namespace {

constexpr int NORM_THREADS = 512, PACKS = 16, AHEAD = 8;  // pixels that a thread reads at once
constexpr int SEGMENTS = 32;

struct Place {  // of this thread
  int packs, rows, row;  // packs and rows of the block
  int64_t channel;
  bool active;
};

template <int V>
__device__ __forceinline__ Place place(int64_t channels) {
  Place p;
  const int64_t all = channels / V, first = int64_t(blockIdx.y) * PACKS;
  p.packs = int(all < PACKS ? all : PACKS);
  p.rows = NORM_THREADS / p.packs;
  p.row = threadIdx.x / p.packs;
  const int64_t pack = first + threadIdx.x % p.packs;
  p.channel = pack * V;
  p.active = p.row < p.rows && pack < all;
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
      for (int i = segment; i < count; i += segments) {
        const Sums one = rows[i * pitch + c];
        sum.first += one.first, sum.second += one.second;
      }
    scratch[segment * width + c] = sum;
  }
  __syncthreads();
  if (threadIdx.x < width) {
    sum = scratch[threadIdx.x];
    for (int s = 1; s < segments; ++s) {
      const Sums one = scratch[s * width + threadIdx.x];
      sum.first += one.first, sum.second += one.second;
    }
  }
  return sum;
}

template <int V, class T>
__device__ __forceinline__ void read(const void* from, int64_t at, float (&to)[V]) {
  const auto pack = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(from) + at);
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = value(pack.at[v]);
}

template <int V, class T>
__device__ __forceinline__ void write(void* to, int64_t at, const float (&from)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) put(pack.at[v], from[v]);
  *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(to) + at) = pack;
}

template <int V>
__device__ __forceinline__ void write_partial(const Place& p, const Sums (&mine)[V],
                                              int64_t channels, Sums* partial) {
  __shared__ Sums rows[NORM_THREADS * V], scratch[NORM_THREADS];
  const int width = p.packs * V;
  if (p.row < p.rows)
#pragma unroll
    for (int v = 0; v < V; ++v) rows[threadIdx.x * V + v] = mine[v];
  __syncthreads();
  const Sums sum = fold(rows, p.rows, width, width, width, scratch);
  const int64_t c = int64_t(blockIdx.y) * PACKS * V + threadIdx.x;
  if (threadIdx.x < width && c < channels) partial[blockIdx.x * channels + c] = sum;
}

// The sums of channel c of the block, over all blocks of the first launch, to thread c.
template <int V>
__device__ __forceinline__ Sums read_partial(const Place& p, const Sums* partial, int count,
                                             int64_t channels, bool& valid) {
  __shared__ Sums scratch[NORM_THREADS];
  const int width = p.packs * V;
  const int64_t first = int64_t(blockIdx.y) * PACKS * V, left = channels - first;
  const int have = int(left < width ? left : width);
  valid = threadIdx.x < have;
  return fold(partial + first, count, channels, width, have, scratch);
}

template <int V, class T>
__global__ void __launch_bounds__(NORM_THREADS) moments_kernel(const BatchNorm a) {
  const Place p = place<V>(a.channels);
  const int64_t step = int64_t(gridDim.x) * p.rows;
  Sums mine[V] = {};
  if (p.active)
    for (int64_t i = int64_t(blockIdx.x) * p.rows + p.row; i < a.pixels; i += step * AHEAD) {
      float x[AHEAD][V];
      int n = 0;
#pragma unroll
      for (int u = 0; u < AHEAD; ++u) {
        const bool inside = i + u * step < a.pixels;
        n += inside;
        if (inside) {
          read<V, T>(a.x, (i + u * step) * a.channels + p.channel, x[u]);
        } else {
#pragma unroll
          for (int v = 0; v < V; ++v) x[u][v] = 0;
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float sum = 0, e = 0, q = 0;
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) sum += x[u][v];
        const float shift = sum / float(n);
#pragma unroll
        for (int u = 0; u < AHEAD; ++u) {
          const float d = u < n ? x[u][v] - shift : 0.0f;
          e += d;
          q += d * d;
        }
        const Sums more = moments(n, shift, e, q);
        mine[v].first += more.first, mine[v].second += more.second;
      }
    }
  write_partial<V>(p, mine, a.channels, a.partial);
}

template <int V, class T>
__global__ void __launch_bounds__(NORM_THREADS) apply_kernel(const BatchNorm a, const int count) {
  __shared__ Channel shared[PACKS * V];
  const Place p = place<V>(a.channels);
  bool valid;
  const Sums sums = read_partial<V>(p, a.partial, count, a.channels, valid);
  if (valid)
    shared[threadIdx.x] =
        finish(a, int64_t(blockIdx.y) * PACKS * V + threadIdx.x, sums, blockIdx.x == 0);
  __syncthreads();
  if (!p.active) return;
  Channel channel[V];
#pragma unroll
  for (int v = 0; v < V; ++v) channel[v] = shared[threadIdx.x % p.packs * V + v];
  const int64_t step = int64_t(gridDim.x) * p.rows;
#pragma unroll 4
  for (int64_t i = int64_t(blockIdx.x) * p.rows + p.row; i < a.pixels; i += step) {
    const int64_t at = i * a.channels + p.channel;
    float x[V], r[V] = {};
    read<V, T>(a.x, at, x);
    if (a.residual) read<V, T>(a.residual, at, r);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      x[v] = batch_norm(x[v], channel[v].mean, channel[v].scale, channel[v].bias);
      if (a.residual) x[v] += r[v];
      if (a.relu) x[v] = relu(x[v]);
    }
    write<V, T>(a.y, at, x);
  }
}

template <int V, class T>
__global__ void __launch_bounds__(NORM_THREADS) gradients_kernel(const BatchNormBackward a) {
  const Place p = place<V>(a.channels);
  Sums mine[V] = {};
  if (p.active) {
    Channel channel[V];
#pragma unroll
    for (int v = 0; v < V; ++v) channel[v] = channel_of(a, p.channel + v);
    const int64_t step = int64_t(gridDim.x) * p.rows;
    constexpr int BATCH = AHEAD / 2;  // twice as much is read
    for (int64_t i = int64_t(blockIdx.x) * p.rows + p.row; i < a.pixels; i += step * BATCH) {
      float g[BATCH][V], x[BATCH][V], y[BATCH][V];
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
        const int64_t at = (i + u * step) * a.channels + p.channel;
        if (i + u * step < a.pixels) {
          read<V, T>(a.dy, at, g[u]);
          read<V, T>(a.x, at, x[u]);
          if (a.y) read<V, T>(a.y, at, y[u]);
        } else {
#pragma unroll
          for (int v = 0; v < V; ++v) g[u][v] = x[u][v] = y[u][v] = 0;
        }
      }
      float first[V] = {}, second[V] = {};
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
        const bool inside = i + u * step < a.pixels;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const Channel c = channel[v];
          if (a.relu)
            g[u][v] = masked(g[u][v], a.y ? y[u][v] : batch_norm(x[u][v], c.mean, c.scale, c.bias));
          first[v] += inside ? g[u][v] : 0.0f;
          second[v] += inside ? g[u][v] * (x[u][v] - c.mean) : 0.0f;
        }
        if (a.y && inside) write<V, T>(a.dresidual, (i + u * step) * a.channels + p.channel, g[u]);
      }
#pragma unroll
      for (int v = 0; v < V; ++v) mine[v].first += first[v], mine[v].second += second[v];
    }
  }
  write_partial<V>(p, mine, a.channels, a.partial);
}

template <int V, class T>
__global__ void __launch_bounds__(NORM_THREADS)
    apply_gradients_kernel(const BatchNormBackward a, const int count) {
  __shared__ Slope shared[PACKS * V];
  const Place p = place<V>(a.channels);
  bool valid;
  const Sums sums = read_partial<V>(p, a.partial, count, a.channels, valid);
  if (valid)
    shared[threadIdx.x] =
        finish(a, int64_t(blockIdx.y) * PACKS * V + threadIdx.x, sums, blockIdx.x == 0);
  __syncthreads();
  if (!p.active) return;
  Channel channel[V];
  Slope slope[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    channel[v] = channel_of(a, p.channel + v);
    slope[v] = shared[threadIdx.x % p.packs * V + v];
  }
  const void* const gradient = a.y ? a.dresidual : a.dy;
  const bool masks = a.relu && !a.y;
  const int64_t step = int64_t(gridDim.x) * p.rows;
#pragma unroll 4
  for (int64_t i = int64_t(blockIdx.x) * p.rows + p.row; i < a.pixels; i += step) {
    const int64_t at = i * a.channels + p.channel;
    float g[V], x[V];
    read<V, T>(gradient, at, g);
    read<V, T>(a.x, at, x);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Channel c = channel[v];
      if (masks) g[v] = masked(g[v], batch_norm(x[v], c.mean, c.scale, c.bias));
      g[v] = input_gradient(g[v], x[v], c.mean, c.scale, slope[v].offset, slope[v].slope);
    }
    write<V, T>(a.dx, at, g);
  }
}

// Of both launches; the second could take more, but each of its blocks reads all partial sums.
template <int V>
dim3 norm_grid(int64_t pixels, int64_t channels, int64_t most) {
  const int64_t packs = channels / V, wide = packs < PACKS ? packs : PACKS;
  const int64_t rows = NORM_THREADS / wide, parts = divide_up(pixels, rows * AHEAD);
  return dim3(unsigned(parts < most ? parts : most), unsigned(divide_up(packs, PACKS)));
}

template <int V, class T>
const char* launch_norm(const BatchNorm& a, cudaStream_t stream) {
  const dim3 first = norm_grid<V>(a.pixels, a.channels, PARTS);
  const dim3 second = norm_grid<V>(a.pixels, a.channels, 4 * PARTS);
  moments_kernel<V, T><<<first, NORM_THREADS, 0, stream>>>(a);
  apply_kernel<V, T><<<second, NORM_THREADS, 0, stream>>>(a, int(first.x));
  return launched();
}

template <int V, class T>
const char* launch_norm(const BatchNormBackward& a, cudaStream_t stream) {
  const dim3 first = norm_grid<V>(a.pixels, a.channels, PARTS);
  const dim3 second = norm_grid<V>(a.pixels, a.channels, 4 * PARTS);
  gradients_kernel<V, T><<<first, NORM_THREADS, 0, stream>>>(a);
  apply_gradients_kernel<V, T><<<second, NORM_THREADS, 0, stream>>>(a, int(first.x));
  return launched();
}

template <class Arguments>
const char* launch_norm(const Arguments& a, bool aligned_all, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.channels > int64_t(PACKS) * 65535) return "more channels than one launch takes";
  if (a.channels % 4 == 0 && aligned_all)
    return a.half ? launch_norm<4, bf16>(a, s) : launch_norm<4, float>(a, s);
  return a.half ? launch_norm<1, bf16>(a, s) : launch_norm<1, float>(a, s);
}

}  // namespace

const char* launch(const BatchNorm& a, void* stream) {
  return launch_norm(a, aligned(a.x, 16) && aligned(a.residual, 16) && aligned(a.y, 16), stream);
}

const char* launch(const BatchNormBackward& a, void* stream) {
  const bool all = aligned(a.dy, 16) && aligned(a.x, 16) && aligned(a.y, 16) &&
                   aligned(a.dx, 16) && aligned(a.dresidual, 16);
  return launch_norm(a, all, stream);
}

}  // namespace datadiet
