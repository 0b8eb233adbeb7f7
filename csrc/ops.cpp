// The schemas of torch.ops.datadiet, the checks of their arguments, and the loops for the CPU.
//
// Only torch's stable ABI is included (torch 2.11 and newer): it compiles in 3 s where the full
// headers take most of a minute. No result depends on the number of threads, on the memory's
// alignment, or on which rows lie beside.
#define TORCH_TARGET_VERSION ((2ULL << 56) | (11ULL << 48))
#ifdef DATADIET_CUDA
#define USE_CUDA
#endif
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "batch_norm.h"
#include "math.h"

namespace datadiet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- checks -------------------------------------------------------------------------------------

std::string name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::ostringstream text;
  const char* comma = "(";
  for (int64_t s : sizes) {
    text << comma;
    s < 0 ? text << "any" : text << s;
    comma = ", ";
  }
  return text.str() + ")";
}

std::string device_text(const Tensor& t) {
  return t.is_cpu() ? "cpu" : "device " + std::to_string(t.get_device_index());
}

// `shape` holds -1 where any size will do; the tensor must lie on the device of `beside`.
void expect(const char* argument, const Tensor& t, std::initializer_list<ScalarType> types,
            std::initializer_list<int64_t> shape, const Tensor& beside) {
  const auto sizes = t.sizes();
  const bool ok =
      std::find(types.begin(), types.end(), t.scalar_type()) != types.end() &&
      std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end(),
                 [](int64_t is, int64_t want) { return want < 0 || is == want; }) &&
      t.is_contiguous() && t.is_cpu() == beside.is_cpu() &&
      t.get_device_index() == beside.get_device_index();
  if (ok) return;
  std::ostringstream text;
  text << argument << " must be a contiguous " << shape_text(shape) << " tensor of ";
  for (auto type : types) text << (type == *types.begin() ? "" : " or ") << name(type);
  text << " on " << device_text(beside) << ", got " << shape_text(sizes) << " "
       << name(t.scalar_type()) << (t.is_contiguous() ? "" : " non-contiguous") << " on "
       << device_text(t);
  throw std::runtime_error(text.str());
}

void expect(const char* argument, bool ok, const char* wanted, int64_t got) {
  if (ok) return;
  throw std::runtime_error(std::string(argument) + " must be " + wanted + ", got " +
                           std::to_string(got));
}

void check_range(const char* argument, const int64_t* x, int64_t n, int64_t limit) {
  for (int64_t i = 0; i < n; ++i)
    if (x[i] < 0 || x[i] >= limit)
      throw std::runtime_error(std::string(argument) + " must lie in [0, " + std::to_string(limit) +
                               "), got " + std::to_string(x[i]) + " at position " +
                               std::to_string(i));
}

Type type_of(ScalarType t) {
  return t == ScalarType::Double     ? Type::f64
         : t == ScalarType::Half     ? Type::f16
         : t == ScalarType::BFloat16 ? Type::bf16
                                     : Type::f32;
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n > 0) torch::stable::parallel_for(0, n, std::max<int64_t>(grain, 1), body);
}

// ---- loops for the CPU --------------------------------------------------------------------------

template <bool MASKED, bool LOW, class G>
void sgd_span(float* __restrict w, float* __restrict m, G* __restrict g,
              const uint8_t* __restrict mask, bf16* __restrict low, int64_t n, float lr, float mu,
              float weight_decay) {
  for (int64_t i = 0; i < n; ++i) {
    float weight = w[i], velocity = m[i];
    sgd(weight, velocity, value(g[i]), MASKED ? mask[i] != 0 : true, lr, mu, weight_decay);
    w[i] = weight;
    m[i] = velocity;
    g[i] = G{};
    if constexpr (LOW) put(low[i], weight);
  }
}

template <bool LOW, class G>
void sgd_loop(const Sgd& a) {
  parallel_for(a.rows * a.columns, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t row = at / a.columns, i = at % a.columns;
      const bool masked = i < a.prunable;
      const int64_t n = std::min((masked ? a.prunable : a.columns) - i, end - at);
      (masked ? sgd_span<true, LOW, G> : sgd_span<false, LOW, G>)(
          a.weights + at, a.momentum + at, static_cast<G*>(a.gradient) + at,
          a.mask + row * a.prunable + i, a.low + (LOW ? at : 0), n,
          a.lr[a.lr_per_row ? row : 0], a.mu, a.weight_decay);
      at += n;
    }
  });
}

void run(const Sgd& a) {
  const bool half = a.gradient_type == Type::bf16;
  (a.low ? half ? sgd_loop<true, bf16> : sgd_loop<true, float>
         : half ? sgd_loop<false, bf16> : sgd_loop<false, float>)(a);
}

constexpr int ROWS = 32;  // rows side by side, one a vector lane: a row's sums are its own
constexpr int CHUNK = 128;  // classes in the tile at a time

// Kept from the vectoriser, which would scatter.
template <class X, class T>
__attribute__((noinline, optimize("no-tree-vectorize"))) void transpose(const X* x, int64_t pitch,
                                                                       int n, int width,
                                                                       T (*tile)[ROWS]) {
  for (int r = 0; r < ROWS; ++r) {
    const X* row = x + std::min(r, n - 1) * pitch;  // lanes past the end repeat the last row
    for (int c = 0; c < width; ++c) tile[c][r] = value(row[c]);
  }
}

template <class X, class T>
void losses_of_rows(const X* x, const int64_t* labels, int64_t classes, int n, T* loss, T* error,
                    T* norm) {
  T tile[CHUNK][ROWS], top[ROWS], own[ROWS], others[ROWS] = {}, squares[ROWS] = {};
  int32_t label[ROWS], wrong[ROWS] = {};
  const auto load = [&](int64_t from) {
    const int width = int(std::min<int64_t>(CHUNK, classes - from));
    transpose(x + from, classes, n, width, tile);
    return width;
  };
  for (int r = 0; r < ROWS; ++r) {
    const int row = std::min(r, n - 1);
    label[r] = int32_t(labels[row]);
    own[r] = value(x[row * classes + label[r]]);
    top[r] = -INFINITY;
  }
  for (int64_t from = 0; from < classes; from += CHUNK) {
    const int width = load(from);
    for (int c = 0; c < width; ++c)
      for (int r = 0; r < ROWS; ++r)
        see_logit(tile[c][r], own[r], int32_t(from + c) < label[r], top[r], wrong[r]);
  }
  for (int64_t from = 0; from < classes; from += CHUNK) {
    const int width = classes > CHUNK ? load(from) : int(classes);
    T part[ROWS] = {}, part_squares[ROWS] = {};
    for (int group = 0; group < width; group += GROUP) {
      T sum[ROWS] = {}, sum_squares[ROWS] = {};
      for (int c = group; c < std::min(group + GROUP, width); ++c)
        for (int r = 0; r < ROWS; ++r)
          add_logit(tile[c][r], top[r], int32_t(from + c) == label[r], sum[r], sum_squares[r]);
      for (int r = 0; r < ROWS; ++r) part[r] += sum[r], part_squares[r] += sum_squares[r];
    }
    for (int r = 0; r < ROWS; ++r) others[r] += part[r], squares[r] += part_squares[r];
  }
  for (int r = 0; r < n; ++r) {
    finish_row(top[r], own[r], others[r], squares[r], loss[r], norm[r]);
    error[r] = T(wrong[r]);
  }
}

template <class X>
void losses_loop(const Losses& a) {
  using T = decltype(value(X{}));
  const int64_t blocks = (a.n + ROWS - 1) / ROWS;
  parallel_for(blocks, 4096 / (ROWS * a.classes), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * ROWS; at < std::min(end * ROWS, a.n); at += ROWS)
      losses_of_rows(static_cast<const X*>(a.logits) + at * a.classes, a.labels + at, a.classes,
                     int(std::min<int64_t>(ROWS, a.n - at)), static_cast<T*>(a.loss) + at,
                     static_cast<T*>(a.error) + at, static_cast<T*>(a.norm) + at);
  });
}

template <class X>
void barrier_loop(const Barrier& a) {
  using T = decltype(value(X{}));
  const int64_t blocks = (a.n + ROWS - 1) / ROWS;
  T *const loss = static_cast<T*>(a.loss), *const error = static_cast<T*>(a.error);
  T *const top_loss = static_cast<T*>(a.top_loss), *const top_error = static_cast<T*>(a.top_error);
  parallel_for(blocks, 4096 / (ROWS * a.classes), [&](int64_t begin, int64_t end) {
    T l[3][ROWS], e[3][ROWS], norm[ROWS];  // both ends, and the network between
    for (int64_t at = begin * ROWS; at < std::min(end * ROWS, a.n); at += ROWS) {
      const int n = int(std::min<int64_t>(ROWS, a.n - at));
      const auto fill = [&](const void* logits, int64_t row, int i) {
        losses_of_rows(static_cast<const X*>(logits) + row * a.classes, a.labels + at, a.classes, n,
                       l[i], e[i], norm);
      };
      fill(a.first, at, 0);
      fill(a.second, at, 1);
      for (int64_t k = 0; k < a.alphas; ++k) {
        fill(a.middle, k * a.n + at, 2);
        for (int r = 0; r < n; ++r) {
          const int64_t to = k * a.n + at + r;
          loss[to] = barrier(l[2][r], l[0][r], l[1][r], T(a.alpha[k]));
          error[to] = barrier(e[2][r], e[0][r], e[1][r], T(a.alpha[k]));
          top_loss[at + r] = k ? supremum(top_loss[at + r], loss[to]) : loss[to];
          top_error[at + r] = k ? supremum(top_error[at + r], error[to]) : error[to];
        }
      }
    }
  });
}

void run(const Losses& a) {
  (a.type == Type::f64   ? losses_loop<double>
   : a.type == Type::f16 ? losses_loop<f16>
   : a.type == Type::bf16 ? losses_loop<bf16>
                         : losses_loop<float>)(a);
}

void run(const Barrier& a) {
  (a.type == Type::f64   ? barrier_loop<double>
   : a.type == Type::f16 ? barrier_loop<f16>
   : a.type == Type::bf16 ? barrier_loop<bf16>
                         : barrier_loop<float>)(a);
}

template <class Out>
void augment_loop(const Augment& a) {
  const int64_t line = a.width * a.channels, image = a.height * line;
  std::vector<float> scale(line), shift(line);  // repeated along a line, so that it is one loop
  for (int64_t i = 0; i < line; ++i) {
    scale[i] = a.scale[i % a.channels];
    shift[i] = a.shift[i % a.channels];
  }
  parallel_for(a.batch, (1 << 14) / std::max<int64_t>(image, 1), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> pixels(line);
    for (int64_t b = begin; b < end; ++b) {
      const Crop crop = draw_crop(a.key, a.step[0], b, a.pad, a.flip);
      for (int64_t y = 0; y < a.height; ++y) {
        const int64_t from_y = y + crop.up;
        std::fill(pixels.begin(), pixels.end(), uint8_t(0));
        if (from_y >= 0 && from_y < a.height) {
          const uint8_t* from = a.images + a.indices[b] * image + from_y * line;
          for (int64_t x = 0; x < a.width; ++x) {
            const int64_t from_x = (crop.mirrored ? a.width - 1 - x : x) + crop.left;
            if (from_x >= 0 && from_x < a.width)
              for (int64_t c = 0; c < a.channels; ++c)
                pixels[x * a.channels + c] = from[from_x * a.channels + c];
          }
        }
        Out* to = static_cast<Out*>(a.out) + b * image + y * line;
        for (int64_t i = 0; i < line; ++i) put(to[i], normalise(pixels[i], scale[i], shift[i]));
      }
    }
  });
}

void run(const Augment& a) {
  (a.type == Type::bf16 ? augment_loop<bf16> : augment_loop<float>)(a);
}

constexpr int64_t CHUNKS = 4;  // of batch_norm.h, below which a thread of its own does not pay

void run(const BatchNorm& a) {
  run_batch_norm(a, [](int64_t n, const auto& body) { parallel_for(n, CHUNKS, body); });
}

void run(const BatchNormBackward& a) {
  run_batch_norm(a, [](int64_t n, const auto& body) { parallel_for(n, CHUNKS, body); });
}

// ---- the operations -----------------------------------------------------------------------------

template <class Arguments>
void dispatch(const Arguments& a, [[maybe_unused]] const Tensor& beside) {
#ifdef DATADIET_CUDA
  if (beside.is_cuda()) {
    const auto device = beside.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(device, &stream))
      throw std::runtime_error("no current CUDA stream on device " + std::to_string(device));
    if (const char* why = launch(a, stream)) throw std::runtime_error(std::string("CUDA: ") + why);
    return;
  }
#endif
  run(a);
}

constexpr auto F32 = ScalarType::Float, F64 = ScalarType::Double, F16 = ScalarType::Half,
               BF16 = ScalarType::BFloat16, I64 = ScalarType::Long;

void masked_sgd_(Tensor weights, Tensor momentum, Tensor gradient, Tensor mask, Tensor lr,
                 double mu, double weight_decay, std::optional<Tensor> low) {
  expect("weights", weights, {F32}, {-1, -1}, weights);
  const int64_t rows = weights.size(0), columns = weights.size(1);
  expect("momentum", momentum, {F32}, {rows, columns}, weights);
  expect("gradient", gradient, {F32, BF16}, {rows, columns}, weights);
  expect("mask", mask, {ScalarType::Bool}, {rows, -1}, weights);
  expect("mask", mask.size(1) <= columns, "no wider than weights", mask.size(1));
  expect("lr", lr, {F32}, {lr.numel() == rows ? rows : 1}, weights);
  if (low) expect("low", *low, {BF16}, {rows, columns}, weights);
  if (rows * columns == 0) return;
  dispatch(Sgd{data<float>(weights), data<float>(momentum), gradient.data_ptr(),
               type_of(gradient.scalar_type()), data<uint8_t>(mask), data<float>(lr),
               lr.numel() > 1, float(mu), float(weight_decay), low ? data<bf16>(*low) : nullptr,
               rows, columns, mask.size(1)},
           weights);
}

void check_logits(const char* argument, const Tensor& logits, const Tensor& labels) {
  expect(argument, logits, {F32, BF16, F16, F64}, {-1, -1}, logits);
  const int64_t n = logits.size(0), classes = logits.size(1);
  expect(argument, classes > 0 && classes < (1 << 30), "of 1 to 2^30 - 1 classes", classes);
  expect("labels", labels, {I64}, {n}, logits);
  if (logits.is_cpu()) check_range("labels", data<int64_t>(labels), n, classes);
}

std::tuple<Tensor, Tensor, Tensor> example_losses(Tensor logits, Tensor labels) {
  check_logits("logits", logits, labels);
  const int64_t n = logits.size(0);
  const auto type = logits.scalar_type() == F64 ? F64 : F32;
  const Tensor loss = torch::stable::new_empty(logits, {n}, type),
               error = torch::stable::new_empty(logits, {n}, type),
               norm = torch::stable::new_empty(logits, {n}, type);
  if (n > 0)
    dispatch(Losses{logits.data_ptr(), type_of(logits.scalar_type()), data<int64_t>(labels),
                    loss.data_ptr(), error.data_ptr(), norm.data_ptr(), n, logits.size(1)},
             logits);
  return {loss, error, norm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_barrier(Tensor middle, Tensor first, Tensor second,
                                                        Tensor labels, Tensor alphas) {
  check_logits("first", first, labels);
  const int64_t n = first.size(0), classes = first.size(1), count = alphas.numel();
  expect("second", second, {first.scalar_type()}, {n, classes}, first);
  expect("alphas", alphas, {F32}, {-1}, first);
  expect("alphas", count > 0, "at least one", count);
  expect("middle", middle, {first.scalar_type()}, {count, n, classes}, first);
  const auto type = first.scalar_type() == F64 ? F64 : F32;
  const Tensor loss = torch::stable::new_empty(first, {count, n}, type),
               error = torch::stable::new_empty(first, {count, n}, type),
               top_loss = torch::stable::new_empty(first, {n}, type),
               top_error = torch::stable::new_empty(first, {n}, type);
  if (n > 0)
    dispatch(Barrier{middle.data_ptr(), first.data_ptr(), second.data_ptr(),
                     type_of(first.scalar_type()), data<int64_t>(labels), data<float>(alphas),
                     loss.data_ptr(), error.data_ptr(), top_loss.data_ptr(), top_error.data_ptr(),
                     count, n, classes},
             first);
  return {loss, error, top_loss, top_error};
}

Tensor augment(Tensor images, Tensor indices, Tensor key, Tensor step, Tensor scale, Tensor shift,
               int64_t pad, bool flip, ScalarType dtype) {
  expect("images", images, {ScalarType::Byte}, {-1, -1, -1, -1}, images);
  const int64_t count = images.size(0), height = images.size(1), width = images.size(2),
                channels = images.size(3), batch = indices.numel();
  expect("images", height * width * channels < (1 << 30), "of fewer than 2^30 values an image",
         height * width * channels);
  expect("indices", indices, {I64}, {-1}, images);
  expect("key", key, {I64}, {2}, images);
  expect("step", step, {I64}, {1}, images);
  expect("scale", scale, {F32}, {channels}, images);
  expect("shift", shift, {F32}, {channels}, images);
  expect("pad", pad >= 0 && pad < (1 << 30), "from 0 to 2^30 - 1", pad);
  if (dtype != F32 && dtype != BF16)
    throw std::runtime_error("dtype must be float32 or bfloat16, got " + name(dtype));
  expect("indices", batch < INT32_MAX, "fewer than 2^31 - 1", batch);
  if (images.is_cpu()) check_range("indices", data<int64_t>(indices), batch, count);
  const Tensor out = torch::stable::empty({batch, channels, height, width}, dtype, std::nullopt,
                                          images.device(), std::nullopt,
                                          torch::headeronly::MemoryFormat::ChannelsLast);
  if (out.numel() > 0)
    dispatch(Augment{data<uint8_t>(images), data<int64_t>(indices), data<int64_t>(key),
                     data<int64_t>(step), data<float>(scale), data<float>(shift), out.data_ptr(),
                     type_of(dtype), count, batch, height, width, channels, pad, flip},
             images);
  return out;
}

// Channels-last, float32 or bfloat16, on the device of `beside`; of its shape and type if not it.
void expect_channels_last(const char* argument, const Tensor& t, const Tensor& beside) {
  const auto type = t.scalar_type();
  const auto sizes = t.sizes(), strides = t.strides(), wanted = beside.sizes();
  bool ok = sizes.size() == 4 && wanted.size() == 4 && (type == F32 || type == BF16) &&
            type == beside.scalar_type() && t.is_cpu() == beside.is_cpu() &&
            t.get_device_index() == beside.get_device_index();
  int64_t dense = 1;
  for (int i : {1, 3, 2, 0}) {
    ok = ok && sizes[i] == wanted[i] && (sizes[i] == 1 || strides[i] == dense);
    if (ok) dense *= sizes[i];
  }
  if (ok) return;
  throw std::runtime_error(std::string(argument) + " must be a channels-last " +
                           shape_text(wanted) + " tensor of " +
                           (beside.scalar_type() == BF16 ? "bfloat16" : "float32") + " on " +
                           device_text(beside) + ", got " + shape_text(sizes) + " " + name(type) +
                           " on " + device_text(t));
}

Tensor partial_sums(const Tensor& x, int64_t pixels, int64_t channels) {
#ifdef DATADIET_CUDA
  if (x.is_cuda()) return torch::stable::new_empty(x, {parts(pixels, channels), channels, 2}, F64);
#endif
  return x;  // on the CPU the loops have their own
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_forward(
    Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, std::optional<Tensor> residual, double momentum, double eps,
    bool relu) {
  expect_channels_last("x", x, x);
  const int64_t channels = x.size(1), pixels = x.size(0) * x.size(2) * x.size(3);
  expect("x", pixels > 1, "of more than one value a channel", pixels);
  expect("x", channels > 0, "of at least one channel", channels);
  expect("weight", weight, {F32}, {channels}, x);
  expect("bias", bias, {F32}, {channels}, x);
  if (running_mean.has_value() != running_var.has_value())
    throw std::runtime_error("running_mean and running_var must both be given, or neither");
  if (running_mean) {
    expect("running_mean", *running_mean, {F32}, {channels}, x);
    expect("running_var", *running_var, {F32}, {channels}, x);
  }
  if (residual) expect_channels_last("residual", *residual, x);
  const Tensor y = torch::stable::empty_like(x), mean = torch::stable::new_empty(x, {channels}, F32),
               rstd = torch::stable::new_empty(x, {channels}, F32),
               partial = partial_sums(x, pixels, channels);
  dispatch(BatchNorm{x.data_ptr(), residual ? residual->data_ptr() : nullptr, y.data_ptr(),
                     type_of(x.scalar_type()), data<float>(weight), data<float>(bias),
                     running_mean ? data<float>(*running_mean) : nullptr,
                     running_var ? data<float>(*running_var) : nullptr, data<float>(mean),
                     data<float>(rstd), data<Sums>(partial), pixels, channels, momentum, eps, relu},
           x);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_backward(
    Tensor dy, Tensor x, std::optional<Tensor> y, Tensor weight, Tensor bias, Tensor mean,
    Tensor rstd, bool relu) {
  expect_channels_last("x", x, x);
  expect_channels_last("dy", dy, x);
  const int64_t channels = x.size(1), pixels = x.size(0) * x.size(2) * x.size(3);
  expect("x", x.numel() > 0, "of at least one value", x.numel());
  if (y) {
    expect_channels_last("y", *y, x);
    expect("relu", relu, "true where y is given", relu);
  }
  for (const Tensor* t : {&weight, &bias, &mean, &rstd})
    expect("weight, bias, mean and rstd", *t, {F32}, {channels}, x);
  const Tensor dx = torch::stable::empty_like(x),
               dresidual = y ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0}),
               dweight = torch::stable::new_empty(x, {channels}, F32),
               dbias = torch::stable::new_empty(x, {channels}, F32),
               partial = partial_sums(x, pixels, channels);
  dispatch(BatchNormBackward{dy.data_ptr(), x.data_ptr(), y ? y->data_ptr() : nullptr,
                             dx.data_ptr(), y ? dresidual.data_ptr() : nullptr,
                             type_of(x.scalar_type()), data<float>(weight), data<float>(bias),
                             data<float>(mean), data<float>(rstd), data<float>(dweight),
                             data<float>(dbias), data<Sums>(partial), pixels, channels, relu},
           x);
  return {dx, dweight, dbias, dresidual};
}

}  // namespace datadiet

STABLE_TORCH_LIBRARY(datadiet, m) {
  m.def(
      "masked_sgd_(Tensor(a!) weights, Tensor(b!) momentum, Tensor(c!) gradient, Tensor mask, "
      "Tensor lr, float mu, float weight_decay, Tensor(d!)? low=None) -> ()");
  m.def("example_losses(Tensor logits, Tensor labels) -> (Tensor, Tensor, Tensor)");
  m.def(
      "loss_barrier(Tensor middle, Tensor first, Tensor second, Tensor labels, Tensor alphas) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "augment(Tensor images, Tensor indices, Tensor key, Tensor step, Tensor scale, Tensor shift, "
      "int pad, bool flip, ScalarType dtype=float) -> Tensor");
  m.def(
      "batch_norm_relu_forward(Tensor x, Tensor weight, Tensor bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor? residual, float momentum, float eps, bool relu) -> "
      "(Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "batch_norm_relu_backward(Tensor dy, Tensor x, Tensor? y, Tensor weight, Tensor bias, "
      "Tensor mean, Tensor rstd, bool relu) -> "
      "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");
}

#define REGISTER(m)                                                                 \
  m.impl("masked_sgd_", TORCH_BOX(&datadiet::masked_sgd_));                         \
  m.impl("example_losses", TORCH_BOX(&datadiet::example_losses));                   \
  m.impl("loss_barrier", TORCH_BOX(&datadiet::loss_barrier));                       \
  m.impl("augment", TORCH_BOX(&datadiet::augment));                                 \
  m.impl("batch_norm_relu_forward", TORCH_BOX(&datadiet::batch_norm_relu_forward)); \
  m.impl("batch_norm_relu_backward", TORCH_BOX(&datadiet::batch_norm_relu_backward))

STABLE_TORCH_LIBRARY_IMPL(datadiet, CPU, m) { REGISTER(m); }
#ifdef DATADIET_CUDA
STABLE_TORCH_LIBRARY_IMPL(datadiet, CUDA, m) { REGISTER(m); }
#endif
