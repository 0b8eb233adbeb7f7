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

#include "formulas.h"

namespace datadiet {

// ---- blocks of neighbouring channels ------------------------------------------------------------

HD float relu(float x, float y, float limit) { return y <= limit ? 0.0f : x; }

template <int N, class T>
HD void load(float (&at)[N], const T* p) {
  const auto values = read_pack<N>(p);
  for (int k = 0; k < N; ++k) at[k] = value(values.at[k]);
}

template <int N, class T>
HD void store(T* p, const float (&at)[N]) {
  Pack<T, N> values;
  for (int k = 0; k < N; ++k) put(values.at[k], at[k]);
  write_pack<N>(p, values);
}

#ifndef __CUDACC__

// As wide as a register: of wider vectors g++ takes the comparisons apart, float by float. With
// AVX2's 8 a block does not fit its 16 registers: in float32 4 are 1.5 times as fast.
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

HD Lanes relu(Lanes x, Lanes y, float limit) { return y <= limit ? Lanes{} : x; }

template <int N, class T>
HD void load(Lanes (&at)[N], const T* p) {
  for (int k = 0; k < N; ++k) {
    if constexpr (std::is_same_v<T, float>) {
      memcpy(&at[k], p + WIDTH * k, sizeof at[k]);
    } else {
      Halves halves;
      memcpy(&halves, p + WIDTH * k, sizeof halves);
      at[k] = Lanes(__builtin_convertvector(halves, Words) << 16);
    }
  }
}

template <int N, class T>
HD void store(T* p, const Lanes (&at)[N]) {
  for (int k = 0; k < N; ++k) {
    if constexpr (std::is_same_v<T, float>) {
      memcpy(p + WIDTH * k, &at[k], sizeof at[k]);
    } else {  // as put() does it
      const Words bits = Words(at[k]), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
      const Words quiet = at[k] != at[k] ? Words{} + 0x7fc0u : rounded;
      const Halves halves = __builtin_convertvector(quiet, Halves);
      memcpy(p + WIDTH * k, &halves, sizeof halves);
    }
  }
}

#endif

template <class V, int N>  // N floats or vectors of them
struct Block {
  V at[N] = {};

  HD Block() {}
  template <class T>
  HD explicit Block(const T* p) {
    load(at, p);
  }
  template <class T>
  HD void write(T* p) const {
    store(p, at);
  }
  template <class F>
  HD Block each(const Block& b, const F& f) const {
    Block out;
    for (int k = 0; k < N; ++k) out.at[k] = f(at[k], b.at[k]);
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
  // ReLU where y is x; the gradient x of one by its input or output y. `limit` is 0, or NaN for no
  // ReLU: nothing compares with that. Where y is NaN, x passes.
  HD friend Block relu(const Block& x, const Block& y, float limit) {
    return x.each(y, [=](V v, V by) { return relu(v, by, limit); });
  }
};

// ---- arithmetic ---------------------------------------------------------------------------------

template <class B>
struct Channel {  // what a value needs of its channel; the last two in the backward pass
  B mean, scale, bias, offset, slope;
};

template <class B>
HD B batch_norm(const B& x, const Channel<B>& c) {
  return (x - c.mean) * c.scale + c.bias;
}

// Forward the sums of x and x^2; backward of g and g (x - mean). In double, where a mean 10,000
// times the deviation still costs the variance no more than float32's rounding.
struct alignas(16) Sums {
  double first, second;
  HD void add(Sums more) { first += more.first, second += more.second; }
};

// Of `n` values x, from e = sum(x - shift) and q = sum((x - shift)^2).
HD Sums moments(double n, double shift, double e, double q) {
  return {n * shift + e, q + shift * (2 * e + n * shift)};
}

struct BatchNorm {
  static constexpr int AHEAD = 8;  // pixels for whose sums a GPU thread loads before it adds
  const void *x, *residual;        // residual or null
  void* y;
  bool is_bf16;
  const float *weight, *bias;
  float *running_mean, *running_var;  // or null
  float *mean, *rstd;
  Sums* partial;  // (PARTS, channels), on a GPU
  int64_t pixels, channels;
  double momentum, eps;
  float limit;

  HD const void* other() const { return residual; }
  HD void* out() const { return y; }
};

// y is given where a residual was added before ReLU, and dresidual with it: the first pass writes
// the masked gradient there, the second reads it. Else the mask is computed again from x.
struct BatchNormBackward {
  static constexpr int AHEAD = 2;
  const void *dy, *x, *y;
  void *dx, *dresidual;
  bool is_bf16;
  const float *weight, *bias, *mean, *rstd;
  float *dweight, *dbias;
  Sums* partial;
  int64_t pixels, channels;
  float limit;

  HD const void* other() const { return y ? dresidual : dy; }
  HD void* out() const { return dx; }
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

// The results of a block of values, from x and what other() points to.
template <class B>
HD B result(const BatchNorm& a, const Channel<B>& c, const B& x, const B& residual) {
  B y = batch_norm(x, c);
  if (a.residual) y = y + residual;
  return relu(y, y, a.limit);
}

template <class B>
HD B result(const BatchNormBackward& a, const Channel<B>& c, const B& x, B g) {
  if (!a.y) g = relu(g, batch_norm(x, c), a.limit);
  return (g - c.offset - (x - c.mean) * c.slope) * c.scale;
}

template <class B>
HD B masked_gradient(const BatchNormBackward& a, const Channel<B>& c, const B& dy, const B& x,
                     const B& y) {
  return relu(dy, a.y ? y : batch_norm(x, c), a.limit);
}

// Each returns null, or CUDA's message.
const char* launch(const BatchNorm&, void* stream);
const char* launch(const BatchNormBackward&, void* stream);

constexpr int64_t PARTS = 128;  // at most, whose sums a GPU's first launch leaves to add up

// ---- loops for the CPU --------------------------------------------------------------------------
//
// Memory is flat with the channels as its period. A row is a number of pixels and of blocks of 64
// lanes, so that a lane keeps its channel and a block its parameters in registers; what is left
// after the last full row goes one by one.

#ifndef __CUDACC__

constexpr int BLOCK = 64;

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
      body(Block<Lanes, BLOCK / WIDTH>(), lane, begin + lane, full);
    for (int64_t at = full; at < end; ++at) body(Block<float, 1>(), at - full, at, end);
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
  void take(int64_t channels, Sums* out) {  // by channel what add() left, which becomes 0
    std::fill_n(out, channels, Sums{0, 0});
    for (const float *p = row(0), *q = row(1); p < row(1); p += channels, q += channels)
      for (int64_t c = 0; c < channels; ++c) out[c].add({p[c], q[c]});
    std::fill_n(row(0), 2 * lanes, 0.0f);
  }
};

// To out[c] the sums of channel c over chunk i.
template <class T>
void sum_chunk(const BatchNorm& a, const Rows& rows, Table&, int64_t i, Table& sums, Sums* out) {
  const T* const x = static_cast<const T*>(a.x);
  const int64_t most = rows.chunk / a.channels;
  const double n = double(std::min(most, a.pixels - i * most));
  float* const shift = sums.row(2);
  const auto add_up = [&](auto shifted) {
    rows.visit(i, [&](auto first, int64_t lane, int64_t begin, int64_t end) {
      typedef decltype(first) B;
      const B mean(shift + lane);
      B second;
      for (int64_t at = begin; at < end; at += rows.lanes) {
        B d(x + at);
        if (shifted) d = d - mean, second = second + d * d;
        first = first + d;
      }
      sums.add(lane, first, second);
    });
    sums.take(a.channels, out);
  };
  add_up(std::false_type());
  for (int64_t j = 0; j < rows.lanes; ++j)
    shift[j] = j < a.channels ? float(out[j].first / n) : shift[j - a.channels];
  add_up(std::true_type());
  for (int64_t c = 0; c < a.channels; ++c)
    out[c] = moments(n, shift[c], out[c].first, out[c].second);
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
      const B value(x + at);
      const B g = masked_gradient(a, channel, B(dy + at), value, y ? B(y + at) : B());
      if (y) g.write(static_cast<T*>(a.dresidual) + at);
      first = first + g;
      second = second + g * (value - channel.mean);
    }
    sums.add(lane, first, second);
  });
  sums.take(a.channels, out);
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
    const Arguments mine = a;  // which no store can change
    const T *const x = static_cast<const T*>(a.x), *const other = static_cast<const T*>(a.other());
    for (int64_t i = begin; i < end; ++i)
      rows.visit(i, [&](auto block, int64_t lane, int64_t first, int64_t last) {
        typedef decltype(block) B;
        const auto channel = table.get<B>(lane);
        for (int64_t at = first; at < last; at += rows.lanes)
          result(mine, channel, B(x + at), other ? B(other + at) : B())
              .write(static_cast<T*>(mine.out()) + at);
      });
  });
}

#endif  // __CUDACC__

}  // namespace datadiet
