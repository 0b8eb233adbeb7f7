// BatchNorm, residual and ReLU on a GPU, a part of ops.cu: two launches each way.
//
// A block takes SLICE channels of one part of the pixels, a thread LANES neighbouring channels of
// every ROWS-th pixel. The first launch writes the sums of each part; in the second every block
// adds up those of its channels, in the same order, and applies them: no atomics. What a thread
// sums depends on the shape alone, so the bits depend neither on the GPU nor on the alignment.
#include "batch_norm.h"

namespace datadiet {
namespace {

constexpr int NORM_THREADS = 512, LANES = 4, SLICE = 16;
constexpr int PACKS = SLICE / LANES, ROWS = NORM_THREADS / PACKS, SEGMENTS = NORM_THREADS / SLICE;
typedef Block<float, LANES> Values;

// Of LANES values, `count` exist (the last channels of a row): all, where WIDE makes one access.
template <bool WIDE, class T>
__device__ __forceinline__ Pack<T, LANES> read(const void* base, int64_t at, int count) {
  const T* const p = static_cast<const T*>(base) + at;
  if constexpr (WIDE) {
    return read_pack<LANES>(p);
  } else {
    Pack<T, LANES> out = {};
#pragma unroll
    for (int v = 0; v < LANES; ++v)
      if (v < count) out.at[v] = p[v];
    return out;
  }
}

template <bool WIDE, class T>
__device__ __forceinline__ void write(void* base, int64_t at, int count, const Values& values) {
  T* const p = static_cast<T*>(base) + at;
  if constexpr (WIDE) {
    values.write(p);
  } else {
#pragma unroll
    for (int v = 0; v < LANES; ++v)
      if (v < count) put(p[v], values.at[v]);
  }
}

struct Position {  // of this thread
  int count;  // how many of its LANES channels exist
  int64_t channel, begin, step, end;  // of values in memory
};

template <class Arguments>
__device__ __forceinline__ Position position(const Arguments& a) {
  const int64_t c = int64_t(blockIdx.y) * SLICE + threadIdx.x % PACKS * LANES;
  const int64_t left = a.channels - c, pixel = int64_t(blockIdx.x) * ROWS + threadIdx.x / PACKS;
  return {int(left < 0 ? 0 : left < LANES ? left : LANES), c, pixel * a.channels + c,
          int64_t(gridDim.x) * ROWS * a.channels, a.pixels * a.channels};
}

// To thread c < SLICE the sum of at(i, c) over i < count.
template <class At>
__device__ __forceinline__ Sums fold(int count, const At& at, Sums (&scratch)[SEGMENTS][SLICE]) {
  const int c = threadIdx.x % SLICE, segment = threadIdx.x / SLICE;
  Sums sum = {0, 0};
#pragma unroll 4
  for (int i = segment; i < count; i += SEGMENTS) sum.add(at(i, c));
  scratch[segment][c] = sum;
  __syncthreads();
  if (segment == 0)
#pragma unroll 4
    for (int s = 1; s < SEGMENTS; ++s) sum.add(scratch[s][c]);
  return sum;
}

// Adds to `sums` those of up to a.AHEAD pixels, `step` apart; all are loaded before the first is
// used.
template <bool WIDE, class T>
__device__ __forceinline__ void add_pixels(const BatchNorm& a, const Channel<Values>&, int64_t at,
                                           const Position& p, Sums (&sums)[LANES]) {
  Pack<T, LANES> x[BatchNorm::AHEAD];
  Values shift, e, q;
  int n = 0;
#pragma unroll
  for (int u = 0; u < a.AHEAD; ++u)
    if (at + u * p.step < p.end) {
      x[u] = read<WIDE, T>(a.x, at + u * p.step, p.count);
      ++n;
    }
#pragma unroll
  for (int u = 0; u < a.AHEAD; ++u)
    if (u < n) shift = shift + Values(x[u].at);
  for (int v = 0; v < LANES; ++v) shift.at[v] /= float(n);
#pragma unroll
  for (int u = 0; u < a.AHEAD; ++u)
    if (u < n) {
      const auto d = Values(x[u].at) - shift;
      e = e + d;
      q = q + d * d;
    }
  for (int v = 0; v < LANES; ++v) sums[v].add(moments(n, shift.at[v], e.at[v], q.at[v]));
}

template <bool WIDE, class T>
__device__ __forceinline__ void add_pixels(const BatchNormBackward& a,
                                           const Channel<Values>& channel, int64_t at,
                                           const Position& p, Sums (&sums)[LANES]) {
  constexpr int AHEAD = BatchNormBackward::AHEAD;
  Pack<T, LANES> dy[AHEAD], x[AHEAD], y[AHEAD] = {};
  Values first, second;
#pragma unroll
  for (int u = 0; u < AHEAD; ++u)
    if (at + u * p.step < p.end) {
      dy[u] = read<WIDE, T>(a.dy, at + u * p.step, p.count);
      x[u] = read<WIDE, T>(a.x, at + u * p.step, p.count);
      if (a.y) y[u] = read<WIDE, T>(a.y, at + u * p.step, p.count);
    }
#pragma unroll
  for (int u = 0; u < AHEAD; ++u)
    if (at + u * p.step < p.end) {
      const Values value(x[u].at);
      const auto g = masked_gradient(a, channel, Values(dy[u].at), value, Values(y[u].at));
      if (a.y) write<WIDE, T>(a.dresidual, at + u * p.step, p.count, g);
      first = first + g;
      second = second + g * (value - channel.mean);
    }
  for (int v = 0; v < LANES; ++v) sums[v].add({first.at[v], second.at[v]});
}

// Channel v of a thread is of(v).
template <class Of>
__device__ __forceinline__ Channel<Values> gather(int count, const Of& of) {
  Channel<Values> all;
  for (int v = 0; v < LANES; ++v) {
    const Channel<float> c = v < count ? of(v) : Channel<float>{};
    all.mean.at[v] = c.mean, all.scale.at[v] = c.scale, all.bias.at[v] = c.bias;
    all.offset.at[v] = c.offset, all.slope.at[v] = c.slope;
  }
  return all;
}

template <bool WIDE, class T, class Arguments>
__global__ void __launch_bounds__(NORM_THREADS) sums_kernel(const Arguments a) {
  // Two more a row: eight threads then meet all 32 banks, writing and reading.
  __shared__ Sums rows[LANES][NORM_THREADS + 2];
  __shared__ Sums scratch[SEGMENTS][SLICE];
  const Position p = position(a);
  Sums mine[LANES] = {};
  if (p.count > 0) {
    const auto channel = gather(p.count, [&](int v) { return start(a, p.channel + v); });
    for (int64_t at = p.begin; at < p.end; at += p.step * a.AHEAD)
      add_pixels<WIDE, T>(a, channel, at, p, mine);
  }
#pragma unroll
  for (int v = 0; v < LANES; ++v) rows[v][threadIdx.x] = mine[v];
  __syncthreads();
  const auto at = [&](int row, int c) { return rows[c % LANES][row * PACKS + c / LANES]; };
  const Sums sums = fold(ROWS, at, scratch);
  const int64_t c = int64_t(blockIdx.y) * SLICE + threadIdx.x;
  if (threadIdx.x < SLICE && c < a.channels) a.partial[blockIdx.x * a.channels + c] = sums;
}

// A thread loads AHEAD pixels before it writes the first: stores may alias for all nvcc knows.
template <bool WIDE, class T, class Arguments>
__global__ void __launch_bounds__(NORM_THREADS, 2)
    apply_kernel(const Arguments a, const int parts) {
  constexpr int AHEAD = Arguments::AHEAD < 4 ? Arguments::AHEAD : 4;
  __shared__ Sums scratch[SEGMENTS][SLICE];
  __shared__ Channel<float> shared[SLICE];
  const Position p = position(a);
  const int64_t from = int64_t(blockIdx.y) * SLICE;
  const auto partial = [&](int i, int c) {
    return from + c < a.channels ? a.partial[i * a.channels + from + c] : Sums{0, 0};
  };
  const Sums sums = fold(parts, partial, scratch);
  if (threadIdx.x < SLICE && from + threadIdx.x < a.channels)
    shared[threadIdx.x] = finish(a, from + threadIdx.x, sums, blockIdx.x == 0);
  __syncthreads();
  if (p.count == 0) return;
  const Channel<float>* const mine = shared + threadIdx.x % PACKS * LANES;
  const auto channel = gather(p.count, [&](int v) { return mine[v]; });
  const void* const other = a.other();
  for (int64_t at = p.begin; at < p.end; at += p.step * AHEAD) {
    Pack<T, LANES> x[AHEAD], second[AHEAD] = {};
#pragma unroll
    for (int u = 0; u < AHEAD; ++u)
      if (at + u * p.step < p.end) {
        x[u] = read<WIDE, T>(a.x, at + u * p.step, p.count);
        if (other) second[u] = read<WIDE, T>(other, at + u * p.step, p.count);
      }
#pragma unroll
    for (int u = 0; u < AHEAD; ++u)
      if (at + u * p.step < p.end)
        write<WIDE, T>(a.out(), at + u * p.step, p.count,
                       result(a, channel, Values(x[u].at), Values(second[u].at)));
  }
}

// PARTS blocks over all slices of the channels, for a small layer too; fewer where a thread would
// get no pixel. The second launch may take more, as each of its blocks reads its channels' sums.
template <bool WIDE, class T, class Arguments>
const char* launch_both(const Arguments& a, cudaStream_t stream) {
  const int64_t slices = divide_up(a.channels, SLICE);
  const int64_t most = slices < PARTS ? PARTS / slices : 1, fit = divide_up(a.pixels, ROWS);
  const int64_t parts = fit < most ? fit : most, full = divide_up(a.pixels, ROWS * 8);
  const int64_t blocks = full < parts ? parts : full < 4 * parts ? full : 4 * parts;
  const dim3 first{unsigned(parts), unsigned(slices)}, second{unsigned(blocks), unsigned(slices)};
  sums_kernel<WIDE, T><<<first, NORM_THREADS, 0, stream>>>(a);
  apply_kernel<WIDE, T><<<second, NORM_THREADS, 0, stream>>>(a, int(parts));
  return launched();
}

template <class Arguments>
const char* launch_norm(const Arguments& a, bool aligned_all, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.channels > int64_t(SLICE) * 65535) return "more channels than one launch takes";
  if (a.channels % LANES == 0 && aligned_all)
    return a.is_bf16 ? launch_both<true, bf16>(a, s) : launch_both<true, float>(a, s);
  return a.is_bf16 ? launch_both<false, bf16>(a, s) : launch_both<false, float>(a, s);
}

}  // namespace

const char* launch(const BatchNorm& a, void* stream) {
  return launch_norm(a, aligned(16, a.x, a.residual, a.y), stream);
}

const char* launch(const BatchNormBackward& a, void* stream) {
  return launch_norm(a, aligned(16, a.dy, a.x, a.y, a.dx, a.dresidual), stream);
}

}  // namespace datadiet
