// BatchNorm over the batch, a residual and ReLU: the arithmetic for host and device, and the loops
// for the CPU.
//
// Tensors are channels-last: a matrix (pixels, channels). It is cut into chunks whose size depends
// on the shape alone; a chunk's sums are taken in float32, against the chunk's own mean, and added
// up over the chunks in double and in order: the same bits for any number of threads.
#pragma once
#include <algorithm>
#include <vector>

#include "math.h"

namespace datadiet {

HD float value(float x) { return x; }
HD float value(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// ---- arithmetic; V is a float, or a vector of floats --------------------------------------------

template <class V>
HD V batch_norm(V x, V mean, V scale, V bias) {
  return (x - mean) * scale + bias;
}

template <class V>
HD V relu(V x) {  // a NaN stays one
  return x <= 0.0f ? V{} : x;
}

template <class V>
HD V masked(V gradient, V y) {  // the gradient of relu, from its input or its output
  return y <= 0.0f ? V{} : gradient;
}

template <class V>
HD V input_gradient(V gradient, V x, V mean, V scale, V offset, V slope) {
  return (gradient - offset - (x - mean) * slope) * scale;
}

// Forward the sums of x and x^2; backward of g and g (x - mean). In double, where a mean 10,000
// times the deviation still costs the variance no more than float32's rounding.
struct Sums {
  double first, second;
};

// Of `n` values x, from e = sum(x - shift) and q = sum((x - shift)^2).
HD Sums moments(double n, double shift, double e, double q) {
  return {n * shift + e, q + shift * (2 * e + n * shift)};
}

constexpr int64_t PARTS = 128;  // at most, that a card's first launch leaves to add up

struct Channel {  // what the second pass needs of a channel
  float mean, scale, bias;
};

struct BatchNorm {
  const void *x, *residual;  // residual or null
  void* y;
  bool half;
  const float *weight, *bias;
  float *running_mean, *running_var;  // or null
  float *mean, *rstd;
  Sums* partial;  // (PARTS, channels), on a card
  int64_t pixels, channels;
  double momentum, eps;
  bool relu;
};

// y is given where a residual was added before ReLU, and dresidual with it: the first pass writes
// there the masked gradient, the second reads it. Else the mask is computed again from x.
struct BatchNormBackward {
  const void *dy, *x, *y;
  void *dx, *dresidual;
  bool half;
  const float *weight, *bias, *mean, *rstd;
  float *dweight, *dbias;
  Sums* partial;
  int64_t pixels, channels;
  bool relu;
};

HD Channel finish(const BatchNorm& a, int64_t c, Sums sums, bool writes) {
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
  return {float(mean), float(a.weight[c] * double(float(rstd))), a.bias[c]};
}

struct Slope {
  float offset, slope;
};

HD Channel channel_of(const BatchNormBackward& a, int64_t c) {
  return {a.mean[c], float(a.weight[c] * double(a.rstd[c])), a.bias[c]};
}

HD Slope finish(const BatchNormBackward& a, int64_t c, Sums sums, bool writes) {
  const double n = double(a.pixels), rstd = a.rstd[c];
  if (writes) {
    a.dweight[c] = float(sums.second * rstd);
    a.dbias[c] = float(sums.first);
  }
  return {float(sums.first / n), float(sums.second * rstd * rstd / n)};
}

// Each returns null, or why the launch failed.
const char* launch(const BatchNorm&, void* stream);
const char* launch(const BatchNormBackward&, void* stream);

#ifndef __CUDACC__

// ---- loops for the CPU --------------------------------------------------------------------------
//
// Memory is flat with the channels as its period. Where they divide 64 a row of 64 values has fixed
// parameters in four vectors (K = 4); else a row is as many whole pixels as fit into 64 (K = 0).

typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Words16 __attribute__((vector_size(64)));
typedef uint16_t Halves16 __attribute__((vector_size(32)));

HD Lanes lanes_at(const float* p) {
  Lanes x;
  memcpy(&x, p, sizeof x);
  return x;
}
HD Lanes lanes_at(const bf16* p) {
  Halves16 x;
  memcpy(&x, p, sizeof x);
  return Lanes(__builtin_convertvector(x, Words16) << 16);
}
HD void put_lanes(float* p, Lanes x) { memcpy(p, &x, sizeof x); }
HD void put_lanes(bf16* p, Lanes x) {
  const Words16 bits = Words16(x), rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const auto halves = __builtin_convertvector(x != x ? Words16{} + 0x7fc0u : rounded, Halves16);
  memcpy(p, &halves, sizeof halves);
}

// Calls wide(i, k) for the vectors of a row, then one(i, j) for the values that are left over.
template <int K, class Wide, class One>
HD void for_rows(int64_t n, int lanes, const Wide& wide, const One& one) {
  int64_t i = 0;
  if constexpr (K > 0)
    for (; i + 16 * K <= n; i += 16 * K)
      for (int k = 0; k < K; ++k) wide(i + 16 * k, k);
  for (; i < n; i += lanes) {
    const int width = int(std::min<int64_t>(lanes, n - i));
    for (int j = 0; j < width; ++j) one(i + j, j);
  }
}

template <int K>
struct Parameter {  // of every lane: in registers for the vectors, in memory for what is left over
  Lanes wide[K + 1];
  const float* lane;
  HD explicit Parameter(const float* from) : lane(from) {
    for (int k = 0; k < K; ++k) wide[k] = lanes_at(from + 16 * k);
  }
};

template <int K>
struct Sum {
  Lanes wide[K + 1] = {};
  float* lane;
  HD Sum(float* to, int64_t lanes) : lane(to) { std::fill(to, to + lanes, 0.0f); }
  HD void end() {
    for (int k = 0; k < K; ++k) put_lanes(lane + 16 * k, lanes_at(lane + 16 * k) + wide[k]);
  }
};

struct Shape {
  int64_t pixels, channels, lanes, chunk, chunks;  // lanes and chunk in values
  Shape(int64_t p, int64_t c) : pixels(p), channels(c) {
    lanes = c < 64 ? 64 / c * c : c;
    chunk = std::max<int64_t>(8192 / lanes, 1) * lanes;
    chunks = (p * c + chunk - 1) / chunk;
  }
  int64_t size(int64_t i) const { return std::min(chunk, pixels * channels - i * chunk); }
  void repeat(float* row) const {  // the first `channels` lanes over all
    for (int64_t j = channels; j < lanes; ++j) row[j] = row[j - channels];
  }
  void fold(const float* row, double* sums) const {
    for (int64_t c = 0; c < channels; ++c) sums[c] = row[c];
    for (int64_t j = channels; j < lanes; j += channels)
      for (int64_t c = 0; c < channels; ++c) sums[c] += row[j + c];
  }
};

struct Scratch {  // of one thread: rows of lanes, and sums by channel
  std::vector<float> rows;
  std::vector<double> sums;
  int64_t lanes, channels;
  explicit Scratch(const Shape& s)
      : rows(3 * s.lanes), sums(2 * s.channels), lanes(s.lanes), channels(s.channels) {}
  float* row(int i) { return rows.data() + i * lanes; }
  double* sum(int i) { return sums.data() + i * channels; }
};

template <int K, class T>
void chunk_moments(const Shape& shape, const T* __restrict x, int64_t n, Scratch& scratch,
                   Sums* out) {
  const int lanes = int(shape.lanes);
  float* const shift = scratch.row(0);
  Sum<K> s(scratch.row(1), lanes);
  for_rows<K>(
      n, lanes, [&](int64_t i, int k) { s.wide[k] += lanes_at(x + i); },
      [&](int64_t i, int j) { s.lane[j] += value(x[i]); });
  s.end();
  double *const e = scratch.sum(0), *const q = scratch.sum(1);
  shape.fold(s.lane, e);
  const double count = double(n / shape.channels);
  for (int64_t c = 0; c < shape.channels; ++c) shift[c] = float(e[c] / count);
  shape.repeat(shift);
  const Parameter<K> from(shift);
  Sum<K> first(scratch.row(1), lanes), second(scratch.row(2), lanes);
  for_rows<K>(
      n, lanes,
      [&](int64_t i, int k) {
        const Lanes d = lanes_at(x + i) - from.wide[k];
        first.wide[k] += d;
        second.wide[k] += d * d;
      },
      [&](int64_t i, int j) {
        const float d = value(x[i]) - from.lane[j];
        first.lane[j] += d;
        second.lane[j] += d * d;
      });
  first.end();
  second.end();
  shape.fold(first.lane, e);
  shape.fold(second.lane, q);
  for (int64_t c = 0; c < shape.channels; ++c) out[c] = moments(count, shift[c], e[c], q[c]);
}

template <int K, bool ADDS, bool RELU, class T>
void apply_chunk(int lanes, const T* __restrict x, const T* __restrict residual, T* __restrict y,
                 int64_t n, const float* mean, const float* scale, const float* bias) {
  const Parameter<K> m(mean), s(scale), b(bias);
  for_rows<K>(
      n, lanes,
      [&](int64_t i, int k) {
        Lanes v = batch_norm(lanes_at(x + i), m.wide[k], s.wide[k], b.wide[k]);
        if (ADDS) v += lanes_at(residual + i);
        put_lanes(y + i, RELU ? relu(v) : v);
      },
      [&](int64_t i, int j) {
        float v = batch_norm(value(x[i]), m.lane[j], s.lane[j], b.lane[j]);
        if (ADDS) v += value(residual[i]);
        put(y[i], RELU ? relu(v) : v);
      });
}

enum Mask { NONE, FROM_X, FROM_Y };

template <int K, int MASK, class T>
void chunk_gradients(const Shape& shape, const T* __restrict dy, const T* __restrict x,
                     const T* __restrict y, T* __restrict dresidual, int64_t n, Scratch& scratch,
                     const float* mean, const float* scale, const float* bias, Sums* out) {
  const int lanes = int(shape.lanes);
  const Parameter<K> m(mean), s(scale), b(bias);
  Sum<K> first(scratch.row(0), lanes), second(scratch.row(1), lanes);
  for_rows<K>(
      n, lanes,
      [&](int64_t i, int k) {
        Lanes g = lanes_at(dy + i), v = lanes_at(x + i);
        if (MASK == FROM_X) g = masked(g, batch_norm(v, m.wide[k], s.wide[k], b.wide[k]));
        if (MASK == FROM_Y) g = masked(g, lanes_at(y + i)), put_lanes(dresidual + i, g);
        first.wide[k] += g;
        second.wide[k] += g * (v - m.wide[k]);
      },
      [&](int64_t i, int j) {
        float g = value(dy[i]), v = value(x[i]);
        if (MASK == FROM_X) g = masked(g, batch_norm(v, m.lane[j], s.lane[j], b.lane[j]));
        if (MASK == FROM_Y) g = masked(g, value(y[i])), put(dresidual[i], g);
        first.lane[j] += g;
        second.lane[j] += g * (v - m.lane[j]);
      });
  first.end();
  second.end();
  shape.fold(first.lane, scratch.sum(0));
  shape.fold(second.lane, scratch.sum(1));
  for (int64_t c = 0; c < shape.channels; ++c) out[c] = {scratch.sum(0)[c], scratch.sum(1)[c]};
}

template <int K, bool MASK, class T>
void apply_gradients(int lanes, const T* __restrict dy, const T* __restrict x, T* __restrict dx,
                     int64_t n, const float* mean, const float* scale, const float* bias,
                     const float* offset, const float* slope) {
  const Parameter<K> m(mean), s(scale), b(bias), o(offset), p(slope);
  for_rows<K>(
      n, lanes,
      [&](int64_t i, int k) {
        Lanes g = lanes_at(dy + i);
        const Lanes v = lanes_at(x + i);
        if (MASK) g = masked(g, batch_norm(v, m.wide[k], s.wide[k], b.wide[k]));
        put_lanes(dx + i, input_gradient(g, v, m.wide[k], s.wide[k], o.wide[k], p.wide[k]));
      },
      [&](int64_t i, int j) {
        float g = value(dy[i]);
        const float v = value(x[i]);
        if (MASK) g = masked(g, batch_norm(v, m.lane[j], s.lane[j], b.lane[j]));
        put(dx[i], input_gradient(g, v, m.lane[j], s.lane[j], o.lane[j], p.lane[j]));
      });
}

inline std::vector<Sums> total(const Shape& shape, const std::vector<Sums>& partial) {
  std::vector<Sums> sums(partial.begin(), partial.begin() + shape.channels);
  for (int64_t i = 1; i < shape.chunks; ++i)
    for (int64_t c = 0; c < shape.channels; ++c) {
      sums[c].first += partial[i * shape.channels + c].first;
      sums[c].second += partial[i * shape.channels + c].second;
    }
  return sums;
}

// `parallel(chunks, body)` calls body(begin, end) on ranges that together are all chunks.
template <int K, class T, class Parallel>
void batch_norm_loop(const BatchNorm& a, const Parallel& parallel) {
  const Shape shape(a.pixels, a.channels);
  const T *const x = static_cast<const T*>(a.x), *const r = static_cast<const T*>(a.residual);
  T* const y = static_cast<T*>(a.y);
  std::vector<Sums> partial(shape.chunks * shape.channels);
  parallel(shape.chunks, [&](int64_t begin, int64_t end) {
    Scratch scratch(shape);
    for (int64_t i = begin; i < end; ++i)
      chunk_moments<K>(shape, x + i * shape.chunk, shape.size(i), scratch,
                       partial.data() + i * shape.channels);
  });
  const std::vector<Sums> sums = total(shape, partial);
  Scratch rows(shape);
  float *const mean = rows.row(0), *const scale = rows.row(1), *const bias = rows.row(2);
  for (int64_t c = 0; c < shape.channels; ++c) {
    const Channel channel = finish(a, c, sums[c], true);
    mean[c] = channel.mean, scale[c] = channel.scale, bias[c] = channel.bias;
  }
  for (float* row : {mean, scale, bias}) shape.repeat(row);
  const auto apply = r ? a.relu ? apply_chunk<K, true, true, T> : apply_chunk<K, true, false, T>
                       : a.relu ? apply_chunk<K, false, true, T> : apply_chunk<K, false, false, T>;
  parallel(shape.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * shape.chunk;
      apply(int(shape.lanes), x + at, r ? r + at : r, y + at, shape.size(i), mean, scale, bias);
    }
  });
}

template <int K, class T, class Parallel>
void batch_norm_loop(const BatchNormBackward& a, const Parallel& parallel) {
  const Shape shape(a.pixels, a.channels);
  const T *const x = static_cast<const T*>(a.x), *const y = static_cast<const T*>(a.y);
  const T* const dy = static_cast<const T*>(a.dy);
  T *const dx = static_cast<T*>(a.dx), *const dresidual = static_cast<T*>(a.dresidual);
  Scratch rows(shape), slopes(shape);
  float *const mean = rows.row(0), *const scale = rows.row(1), *const bias = rows.row(2);
  float *const offset = slopes.row(0), *const slope = slopes.row(1);
  for (int64_t c = 0; c < shape.channels; ++c) {
    const Channel channel = channel_of(a, c);
    mean[c] = channel.mean, scale[c] = channel.scale, bias[c] = channel.bias;
  }
  for (float* row : {mean, scale, bias}) shape.repeat(row);
  std::vector<Sums> partial(shape.chunks * shape.channels);
  const auto reduce = !a.relu ? chunk_gradients<K, NONE, T>
                      : y     ? chunk_gradients<K, FROM_Y, T>
                              : chunk_gradients<K, FROM_X, T>;
  parallel(shape.chunks, [&](int64_t begin, int64_t end) {
    Scratch scratch(shape);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * shape.chunk;
      reduce(shape, dy + at, x + at, y ? y + at : y, y ? dresidual + at : dresidual, shape.size(i),
             scratch, mean, scale, bias, partial.data() + i * shape.channels);
    }
  });
  const std::vector<Sums> sums = total(shape, partial);
  for (int64_t c = 0; c < shape.channels; ++c) {
    const Slope s = finish(a, c, sums[c], true);
    offset[c] = s.offset, slope[c] = s.slope;
  }
  for (float* row : {offset, slope}) shape.repeat(row);
  const T* const g = y ? dresidual : dy;
  const auto apply = a.relu && !y ? apply_gradients<K, true, T> : apply_gradients<K, false, T>;
  parallel(shape.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * shape.chunk;
      apply(int(shape.lanes), g + at, x + at, dx + at, shape.size(i), mean, scale, bias, offset,
            slope);
    }
  });
}

template <class Arguments, class Parallel>
void run_batch_norm(const Arguments& a, const Parallel& parallel) {
  const bool wide = 64 % a.channels == 0;
  if (a.half)
    wide ? batch_norm_loop<4, bf16>(a, parallel) : batch_norm_loop<0, bf16>(a, parallel);
  else
    wide ? batch_norm_loop<4, float>(a, parallel) : batch_norm_loop<0, float>(a, parallel);
}

#endif  // __CUDACC__

}  // namespace datadiet
