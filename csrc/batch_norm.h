// BatchNorm over the batch, a residual and ReLU: the arithmetic for host and device, and the loops
// for the CPU.
//
// Tensors are channels-last: a matrix (pixels, channels). It is cut into chunks whose size depends
// on the shape alone; a chunk's sums are taken in float32, against the chunk's own mean, and added
// up over the chunks in double and in order: the same bits for any number of threads.
#pragma once
#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "math.h"

namespace datadiet {

// ---- arithmetic; V is a float, or a block of floats ---------------------------------------------

template <class V>
struct Channel {  // what a value needs of its channel; the last two in the backward pass
  V mean, scale, bias, offset, slope;
};

template <class V>
HD V batch_norm(V x, const Channel<V>& c) {
  return (x - c.mean) * c.scale + c.bias;
}

template <class V>
HD V input_gradient(V gradient, V x, const Channel<V>& c) {
  return (gradient - c.offset - (x - c.mean) * c.slope) * c.scale;
}

// ReLU (y is x), and its gradient x from its input or output y. `limit` is 0, or NaN for no ReLU:
// nothing compares with that. A NaN in y lets x pass.
template <class V>
HD V relu(V x, V y, float limit) {
  return y <= limit ? V{} : x;
}

// Forward the sums of x and x^2; backward of g and g (x - mean). In double, where a mean 10,000
// times the deviation still costs the variance no more than float32's rounding.
struct Sums {
  double first, second;
  HD void add(Sums more) { first += more.first, second += more.second; }
};

// Of `n` values x, from e = sum(x - shift) and q = sum((x - shift)^2).
HD Sums moments(double n, double shift, double e, double q) {
  return {n * shift + e, q + shift * (2 * e + n * shift)};
}

struct BatchNorm {
  static constexpr int AHEAD = 8;  // pixels that a thread of a card reads at once
  const void *x, *residual;  // residual or null
  void* y;
  bool half;
  const float *weight, *bias;
  float *running_mean, *running_var;  // or null
  float *mean, *rstd;
  Sums* partial;  // (PARTS, channels), on a card
  int64_t pixels, channels;
  double momentum, eps;
  float limit;
};

// y is given where a residual was added before ReLU, and dresidual with it: the first pass writes
// there the masked gradient, the second reads it. Else the mask is computed again from x.
struct BatchNormBackward {
  static constexpr int AHEAD = 4;  // of twice as much
  const void *dy, *x, *y;
  void *dx, *dresidual;
  bool half;
  const float *weight, *bias, *mean, *rstd;
  float *dweight, *dbias;
  Sums* partial;
  int64_t pixels, channels;
  float limit;
};

HD Channel<float> start(const BatchNormBackward& a, int64_t c) {
  return {a.mean[c], float(a.weight[c] * double(a.rstd[c])), a.bias[c], 0, 0};
}

HD Channel<float> start(const BatchNorm&, int64_t) { return {}; }  // needs the sums first

HD Channel<float> finish(const BatchNorm& a, int64_t c, Sums sums, bool writes) {
  using std::sqrt;
  const double n = double(a.pixels), mean = sums.first / n;
  const double spread = sums.second / n - mean * mean, variance = spread < 0 ? 0 : spread;
  const double rstd = 1 / sqrt(variance + a.eps);
  if (writes) {
    a.mean[c] = float(mean);
    a.rstd[c] = float(rstd);
    if (a.running_mean) {
      a.running_mean[c] = float((1 - a.momentum) * a.running_mean[c] + a.momentum * mean);
      const double unbiased = variance * (n / (n - 1));
      a.running_var[c] = float((1 - a.momentum) * a.running_var[c] + a.momentum * unbiased);
    }
  }
  return {float(mean), float(a.weight[c] * double(float(rstd))), a.bias[c], 0, 0};
}

HD Channel<float> finish(const BatchNormBackward& a, int64_t c, Sums sums, bool writes) {
  const double n = double(a.pixels), rstd = a.rstd[c];
  if (writes) {
    a.dweight[c] = float(sums.second * rstd);
    a.dbias[c] = float(sums.first);
  }
  auto channel = start(a, c);
  channel.offset = float(sums.first / n);
  channel.slope = float(sums.second * rstd * rstd / n);
  return channel;
}

// Each returns null, or why the launch failed.
const char* launch(const BatchNorm&, void* stream);
const char* launch(const BatchNormBackward&, void* stream);

constexpr int64_t PARTS = 128;  // at most, that a card's first launch leaves to add up

// ---- loops for the CPU --------------------------------------------------------------------------
//
// Memory is flat with the channels as its period. A row of it is whole pixels and whole blocks of
// 64 lanes, so a lane keeps its channel, and a block its parameters in registers; what is left
// after the last full row goes one by one.

#ifndef __CUDACC__

typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

HD void load(float& x, const float* p) { x = *p; }
HD void load(float& x, const bf16* p) { x = value(*p); }
HD void load(Lanes& x, const float* p) { memcpy(&x, p, sizeof x); }
HD void load(Lanes& x, const bf16* p) {
  Halves halves;
  memcpy(&halves, p, sizeof halves);
  x = Lanes(__builtin_convertvector(halves, Words) << 16);
}

template <class T>
HD void store(T* p, float x) {
  put(*p, x);
}
HD void store(float* p, Lanes x) { memcpy(p, &x, sizeof x); }
HD void store(bf16* p, Lanes x) {
  const Words bits = Words(x), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const auto halves = __builtin_convertvector(x != x ? Words{} + 0x7fc0u : rounded, Halves);
  memcpy(p, &halves, sizeof halves);
}

constexpr int BLOCK = 64;

template <class V>
struct Block {  // of lanes: four vectors, or one float
  static constexpr int WIDTH = sizeof(V) / sizeof(float), SIZE = WIDTH == 1 ? 1 : BLOCK / WIDTH;
  V at[SIZE] = {};

  HD Block() {}
  template <class T>
  HD explicit Block(const T* p) {
    for (int k = 0; k < SIZE; ++k) load(at[k], p + k * WIDTH);
  }
  template <class T>
  HD void write(T* p) const {
    for (int k = 0; k < SIZE; ++k) store(p + k * WIDTH, at[k]);
  }
  template <class F>
  HD Block each(const Block& b, const F& f) const {
    Block out;
    for (int k = 0; k < SIZE; ++k) out.at[k] = f(at[k], b.at[k]);
    return out;
  }
  HD Block operator+(const Block& b) const {
    return each(b, [](V x, V y) { return x + y; });
  }
  HD Block operator-(const Block& b) const {
    return each(b, [](V x, V y) { return x - y; });
  }
  HD Block operator*(const Block& b) const {
    return each(b, [](V x, V y) { return x * y; });
  }
  HD friend Block relu(const Block& x, const Block& y, float limit) {
    return x.each(y, [=](V v, V by) { return relu(v, by, limit); });
  }
};

struct Rows {
  int64_t pixels, channels, lanes, chunk, chunks;  // lanes and chunk in values
  Rows(int64_t p, int64_t c) : pixels(p), channels(c), lanes(std::lcm(c, BLOCK)) {
    chunk = std::max<int64_t>(8192 / lanes, 1) * lanes;
    chunks = (p * c + chunk - 1) / chunk;
  }

  // Calls body(Block, lane, begin, end) for values begin, begin + lanes, .. before end of chunk i.
  template <class Body>
  HD void visit(int64_t i, const Body& body) const {
    const int64_t begin = i * chunk, end = std::min(begin + chunk, pixels * channels);
    const int64_t full = end - (end - begin) % lanes;
    for (int64_t lane = 0; lane < lanes; lane += BLOCK)
      body(Block<Lanes>(), lane, begin + lane, full);
    for (int64_t at = full; at < end; ++at) body(Block<float>(), at - full, at, end);
  }
};

struct Table {  // rows of a number for every lane
  int64_t lanes;
  std::vector<float> values;
  Table(int64_t rows, int64_t lanes) : lanes(lanes), values(rows * lanes) {}
  float* row(int64_t r, int64_t lane = 0) { return values.data() + r * lanes + lane; }

  void set(int64_t lane, const Channel<float>& c) {
    const float of[] = {c.mean, c.scale, c.bias, c.offset, c.slope};
    for (int r = 0; r < 5; ++r) *row(r, lane) = of[r];
  }
  template <class B>
  HD Channel<B> get(int64_t lane) {
    return {B(row(0, lane)), B(row(1, lane)), B(row(2, lane)), B(row(3, lane)), B(row(4, lane))};
  }
  template <class B>
  HD void add(int64_t lane, const B& first, const B& second) {
    (B(row(0, lane)) + first).write(row(0, lane));
    (B(row(1, lane)) + second).write(row(1, lane));
  }
  Sums take(int64_t channel, int64_t channels) {  // what add() left, which becomes 0
    Sums sums = {0, 0};
    for (int64_t j = channel; j < lanes; j += channels) {
      sums.add({*row(0, j), *row(1, j)});
      *row(0, j) = *row(1, j) = 0;
    }
    return sums;
  }
};

// To out[c] the sums of channel c over chunk i.
template <class T>
void sum_chunk(const BatchNorm& a, const Rows& rows, Table&, int64_t i, Table& sums, Sums* out) {
  const T* const x = static_cast<const T*>(a.x);
  const double n = double(std::min(rows.chunk / a.channels, a.pixels - i * rows.chunk / a.channels));
  std::fill_n(sums.row(2), rows.lanes, 0.0f);
  for (const bool again : {false, true}) {  // for the chunk's mean, then against it
    rows.visit(i, [&](auto first, int64_t lane, int64_t begin, int64_t end) {
      typedef decltype(first) B;
      const B shift(sums.row(2, lane));
      B second;
      for (int64_t at = begin; at < end; at += rows.lanes) {
        const B d = B(x + at) - shift;
        first = first + d;
        if (again) second = second + d * d;
      }
      sums.add(lane, first, second);
    });
    for (int64_t c = 0; c < a.channels; ++c) {
      const Sums of = sums.take(c, a.channels);
      if (again) out[c] = moments(n, *sums.row(2, c), of.first, of.second);
      for (int64_t j = c; j < rows.lanes; j += a.channels) *sums.row(2, j) = float(of.first / n);
    }
  }
}

template <class T>
void sum_chunk(const BatchNormBackward& a, const Rows& rows, Table& table, int64_t i, Table& sums,
               Sums* out) {
  const T *const dy = static_cast<const T*>(a.dy), *const x = static_cast<const T*>(a.x),
          *const y = static_cast<const T*>(a.y);
  rows.visit(i, [&](auto first, int64_t lane, int64_t begin, int64_t end) {
    typedef decltype(first) B;
    const auto channel = table.get<B>(lane);
    B second;
    for (int64_t at = begin; at < end; at += rows.lanes) {
      const B v(x + at);
      const B g = relu(B(dy + at), y ? B(y + at) : batch_norm(v, channel), a.limit);
      if (y) g.write(static_cast<T*>(a.dresidual) + at);
      first = first + g;
      second = second + g * (v - channel.mean);
    }
    sums.add(lane, first, second);
  });
  for (int64_t c = 0; c < a.channels; ++c) out[c] = sums.take(c, a.channels);
}

// The results of chunk i.
template <class T>
void apply_chunk(const BatchNorm& a, const Rows& rows, Table& table, int64_t i) {
  const T *const x = static_cast<const T*>(a.x), *const r = static_cast<const T*>(a.residual);
  rows.visit(i, [&](auto block, int64_t lane, int64_t begin, int64_t end) {
    typedef decltype(block) B;
    const auto channel = table.get<B>(lane);
    for (int64_t at = begin; at < end; at += rows.lanes) {
      B v = batch_norm(B(x + at), channel);
      if (r) v = v + B(r + at);
      relu(v, v, a.limit).write(static_cast<T*>(a.y) + at);
    }
  });
}

template <class T>
void apply_chunk(const BatchNormBackward& a, const Rows& rows, Table& table, int64_t i) {
  const T* const dy = static_cast<const T*>(a.y ? a.dresidual : a.dy);
  const T* const x = static_cast<const T*>(a.x);
  const float limit = a.y ? NAN : a.limit;
  rows.visit(i, [&](auto block, int64_t lane, int64_t begin, int64_t end) {
    typedef decltype(block) B;
    const auto channel = table.get<B>(lane);
    for (int64_t at = begin; at < end; at += rows.lanes) {
      const B v(x + at), g = relu(B(dy + at), batch_norm(v, channel), limit);
      input_gradient(g, v, channel).write(static_cast<T*>(a.dx) + at);
    }
  });
}

// `parallel(chunks, body)` calls body(begin, end) on ranges that together are all chunks.
template <class T, class Arguments, class Parallel>
void batch_norm_loop(const Arguments& a, const Parallel& parallel) {
  const Rows rows(a.pixels, a.channels);
  Table table(5, rows.lanes);
  std::vector<Sums> partial(rows.chunks * a.channels);
  for (int64_t j = 0; j < rows.lanes; ++j) table.set(j, start(a, j % a.channels));
  parallel(rows.chunks, [&](int64_t begin, int64_t end) {
    Table sums(3, rows.lanes);
    for (int64_t i = begin; i < end; ++i)
      sum_chunk<T>(a, rows, table, i, sums, partial.data() + i * a.channels);
  });
  for (int64_t c = 0; c < a.channels; ++c) {
    Sums sums = partial[c];
    for (int64_t i = 1; i < rows.chunks; ++i) sums.add(partial[i * a.channels + c]);
    const auto channel = finish(a, c, sums, true);
    for (int64_t j = c; j < rows.lanes; j += a.channels) table.set(j, channel);
  }
  parallel(rows.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) apply_chunk<T>(a, rows, table, i);
  });
}

#endif  // __CUDACC__

}  // namespace datadiet
