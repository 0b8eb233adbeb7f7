// The schemas of torch.ops.datadiet, the checks of their arguments, and the loops for the CPU.
//
// Only torch's stable ABI is included (torch 2.11 and newer): it compiles in 3 s where the full
// headers take most of a minute. No result depends on the number of threads, on the alignment of
// memory, or on the other rows.
#define TORCH_TARGET_VERSION ((2ULL << 56) | (11ULL << 48))
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
#include "formulas.h"

namespace datadiet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

bool on_gpu([[maybe_unused]] const Tensor& t) {
#ifdef USE_CUDA
  return t.is_cuda();
#else
  return false;
#endif
}

Tensor floats(const Tensor& like, int64_t n) {
  return torch::stable::new_empty(like, {n}, ScalarType::Float);
}

// ---- checks -------------------------------------------------------------------------------------

constexpr auto F32 = ScalarType::Float, BF16 = ScalarType::BFloat16, I64 = ScalarType::Long;

template <class... Parts>
void expect(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string text(Sizes sizes) {
  std::string out;
  for (int64_t s : sizes) out += (out.empty() ? "(" : ", ") + (s < 0 ? "any" : std::to_string(s));
  return out + ")";
}

std::string device(const Tensor& t) {
  return t.is_cpu() ? "cpu" : "device " + std::to_string(t.get_device_index());
}

bool is_channels_last(const Tensor& t) {
  int64_t stride = 1;
  for (int dim : {1, 3, 2, 0}) {
    if (t.size(dim) != 1 && t.stride(dim) != stride) return false;
    stride *= t.size(dim);
  }
  return true;
}

// `shape` holds -1 where any size will do; the tensor must lie on the device of `like`.
void expect(const char* argument, const Tensor& t, ScalarType type, Sizes shape,
            const Tensor& like, bool channels_last = false) {
  const Sizes sizes = t.sizes();
  if (t.scalar_type() == type && t.is_cpu() == like.is_cpu() &&
      t.get_device_index() == like.get_device_index() &&
      std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end(),
                 [](int64_t is, int64_t want) { return want < 0 || is == want; }) &&
      (channels_last ? is_channels_last(t) : t.is_contiguous()))
    return;
  expect(false, argument, " must be a ", channels_last ? "channels-last " : "contiguous ",
         text(shape), " tensor of ", type, " on ", device(like), ", got ", text(sizes), " ",
         t.scalar_type(), t.is_contiguous() ? "" : " non-contiguous", " on ", device(t));
}

// On the CPU; to read values of a GPU the host would wait, and its kernels check them themselves.
void expect_range(const char* argument, const Tensor& t, int64_t limit) {
  if (on_gpu(t)) return;
  const int64_t* const x = data<int64_t>(t);
  for (int64_t i = 0; i < t.numel(); ++i)
    if (x[i] < 0 || x[i] >= limit)
      expect(false, argument, " must lie in [0, ", limit, "), got ", x[i], " at position ", i);
}

template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n > 0) torch::stable::parallel_for(0, n, std::max<int64_t>(grain, 1), body);
}

// ---- loops for the CPU --------------------------------------------------------------------------

template <bool MASKED>
void sgd_span(const Sgd& a, float* __restrict w, float* __restrict m, float* __restrict g,
              const uint8_t* __restrict mask, int64_t n) {
  const float lr = a.lr[0];
  for (int64_t i = 0; i < n; ++i) {
    float weight = w[i], velocity = m[i];
    sgd(weight, velocity, g[i], MASKED ? mask[i] != 0 : true, lr, a.mu, a.weight_decay);
    w[i] = weight;
    m[i] = velocity;
    g[i] = 0;
  }
}

void run(const Sgd& a) {
  parallel_for(a.rows * a.columns, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin, n; at < end; at += n) {
      const int64_t row = at / a.columns, i = at % a.columns;
      const bool masked = i < a.prunable;
      n = std::min((masked ? a.prunable : a.columns) - i, end - at);
      const uint8_t* const mask = a.mask + row * a.prunable + i;
      (masked ? sgd_span<true> : sgd_span<false>)(a, a.weights + at, a.momentum + at,
                                                  a.gradient + at, mask, n);
      if (a.weights_bf16)
        for (int64_t j = at; j < at + n; ++j) put(a.weights_bf16[j], a.weights[j]);
    }
  });
}

constexpr int ROWS = 32;  // rows side by side, one a vector lane: a row's sums are its own

#ifdef __clang__
#define SCALAR __attribute__((noinline))
#define SCALAR_LOOP _Pragma("clang loop vectorize(disable)")
#else
#define SCALAR __attribute__((noinline, optimize("no-tree-vectorize")))
#define SCALAR_LOOP
#endif

// Lanes past the end repeat the last row. Kept from the vectoriser, which would scatter.
SCALAR void transpose(const float* x, int64_t classes, int n, float (*to)[ROWS]) {
  for (int r = 0; r < ROWS; ++r)
    SCALAR_LOOP
    for (int64_t c = 0; c < classes; ++c) to[c][r] = x[std::min(r, n - 1) * classes + c];
}

void losses_of_rows(const float* x, const int64_t* labels, int64_t classes, int n, float* loss,
                    float* error, float* norm) {
  thread_local std::vector<float> tile;
  tile.resize(classes * ROWS);
  float(*const logits)[ROWS] = reinterpret_cast<float(*)[ROWS]>(tile.data());
  float top[ROWS], own[ROWS], others[ROWS] = {}, squares[ROWS] = {};
  int32_t label[ROWS], wrong[ROWS] = {};
  transpose(x, classes, n, logits);
  for (int r = 0; r < ROWS; ++r) {
    label[r] = int32_t(labels[std::min(r, n - 1)]);
    own[r] = logits[label[r]][r];
    top[r] = -INFINITY;
  }
  for (int c = 0; c < classes; ++c)
    for (int r = 0; r < ROWS; ++r)
      see_logit(logits[c][r], own[r], c < label[r], top[r], wrong[r]);
  for (int64_t group = 0; group < classes; group += GROUP) {
    float sum[ROWS] = {}, sum_squares[ROWS] = {};
    for (int c = int(group); c < std::min(group + GROUP, classes); ++c)
      for (int r = 0; r < ROWS; ++r)
        add_logit(logits[c][r], top[r], c == label[r], sum[r], sum_squares[r]);
    for (int r = 0; r < ROWS; ++r) others[r] += sum[r], squares[r] += sum_squares[r];
  }
  for (int r = 0; r < n; ++r) {
    finish_row(top[r], own[r], others[r], squares[r], loss[r], norm[r]);
    error[r] = float(wrong[r]);
  }
}

// `body` gets the first row and the number of rows of each tile.
template <class Body>
void parallel_tiles(int64_t n, int64_t classes, const Body& body) {
  parallel_for((n + ROWS - 1) / ROWS, 4096 / (ROWS * classes), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * ROWS; at < std::min(end * ROWS, n); at += ROWS)
      body(at, int(std::min<int64_t>(ROWS, n - at)));
  });
}

void run(const Losses& a) {
  parallel_tiles(a.n, a.classes, [&](int64_t at, int n) {
    losses_of_rows(a.logits + at * a.classes, a.labels + at, a.classes, n, a.loss + at,
                   a.error + at, a.norm + at);
  });
}

void run(const Barrier& a) {
  parallel_tiles(a.n, a.classes, [&](int64_t at, int n) {
    float loss[3][ROWS], error[3][ROWS], norm[ROWS];
    const float* const logits[] = {a.first, a.second, a.middle};
    for (int i = 0; i < 3; ++i)
      losses_of_rows(logits[i] + at * a.classes, a.labels + at, a.classes, n, loss[i], error[i],
                     norm);
    for (int r = 0; r < n; ++r) {
      a.loss[at + r] = barrier(loss[2][r], loss[0][r], loss[1][r], a.alpha);
      a.error[at + r] = barrier(error[2][r], error[0][r], error[1][r], a.alpha);
    }
  });
}

template <class Out>
void augment_loop(const Augment& a) {
  const int64_t image = a.height * a.width * a.channels;
  parallel_for(a.batch, (1 << 14) / std::max<int64_t>(image, 1), [&](int64_t begin, int64_t end) {
    Out* to = static_cast<Out*>(a.out) + begin * image;
    for (int64_t b = begin; b < end; ++b)
      for (int y = 0; y < a.height; ++y)
        for (int x = 0; x < a.width; ++x) {
          const uint8_t* const from = source(a, b, y, x);
          for (int c = 0; c < a.channels; ++c)
            put(*to++, normalise(from ? from[c] : 0, a.scale[c], a.shift[c]));
        }
  });
}

void run(const Augment& a) { (a.is_bf16 ? augment_loop<bf16> : augment_loop<float>)(a); }

constexpr int64_t CHUNKS = 4;  // of batch_norm.h, below which a thread of its own does not pay

template <class Arguments>
void run(const Arguments& a) {
  const auto chunks = [](int64_t n, const auto& body) { parallel_for(n, CHUNKS, body); };
  a.is_bf16 ? batch_norm_loop<bf16>(a, chunks) : batch_norm_loop<float>(a, chunks);
}

// ---- the operations -----------------------------------------------------------------------------

template <class Arguments>
void dispatch(const Arguments& a, const Tensor& like) {
  if (!on_gpu(like)) return run(a);
#ifdef USE_CUDA
  const auto index = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  void* stream = nullptr;
  expect(!aoti_torch_get_current_cuda_stream(index, &stream), "no stream on device ", index);
  const char* const error = launch(a, stream);
  expect(!error, "CUDA: ", error);
#endif
}

void masked_sgd_(Tensor weights, Tensor momentum, Tensor gradient, Tensor mask, Tensor lr,
                 double mu, double weight_decay, std::optional<Tensor> weights_bf16) {
  expect("weights", weights, F32, {-1, -1}, weights);
  const Sizes shape = weights.sizes();
  expect("momentum", momentum, F32, shape, weights);
  expect("gradient", gradient, F32, shape, weights);
  expect("mask", mask, ScalarType::Bool, {shape[0], -1}, weights);
  expect(mask.size(1) <= shape[1], "mask must be no wider than weights, got ", mask.size(1));
  expect("lr", lr, F32, {1}, weights);
  if (weights_bf16) expect("weights_bf16", *weights_bf16, BF16, shape, weights);
  if (weights.numel() == 0) return;
  dispatch(Sgd{data<float>(weights), data<float>(momentum), data<float>(gradient),
               data<uint8_t>(mask), data<float>(lr), float(mu), float(weight_decay),
               weights_bf16 ? data<bf16>(*weights_bf16) : nullptr, shape[0], shape[1],
               mask.size(1)},
           weights);
}

void expect_logits(const char* argument, const Tensor& logits, const Tensor& labels) {
  expect(argument, logits, F32, {-1, -1}, logits);
  const int64_t n = logits.size(0), classes = logits.size(1);
  expect(classes > 0 && classes < (1 << 30), argument, " must be of 1 to 2^30 - 1 classes, got ",
         classes);
  expect("labels", labels, I64, {n}, logits);
  expect_range("labels", labels, classes);
}

std::tuple<Tensor, Tensor, Tensor> example_losses(Tensor logits, Tensor labels) {
  expect_logits("logits", logits, labels);
  const int64_t n = logits.size(0);
  const Tensor loss = floats(logits, n), error = floats(logits, n),
               norm = floats(logits, n);
  if (n > 0)
    dispatch(Losses{data<float>(logits), data<int64_t>(labels), data<float>(loss),
                    data<float>(error), data<float>(norm), n, logits.size(1)},
             logits);
  return {loss, error, norm};
}

std::tuple<Tensor, Tensor> loss_barrier(Tensor middle, Tensor first, Tensor second, Tensor labels,
                                        double alpha) {
  expect_logits("middle", middle, labels);
  expect("first", first, F32, middle.sizes(), middle);
  expect("second", second, F32, middle.sizes(), middle);
  const int64_t n = middle.size(0);
  const Tensor loss = floats(middle, n), error = floats(middle, n);
  if (n > 0)
    dispatch(Barrier{data<float>(middle), data<float>(first), data<float>(second),
                     data<int64_t>(labels), float(alpha), data<float>(loss), data<float>(error), n,
                     middle.size(1)},
             middle);
  return {loss, error};
}

Tensor augment(Tensor images, Tensor indices, Tensor crops, Tensor scale, Tensor shift,
               ScalarType dtype) {
  expect("images", images, ScalarType::Byte, {-1, -1, -1, -1}, images);
  const int64_t count = images.size(0), height = images.size(1), width = images.size(2),
                channels = images.size(3), batch = indices.numel();
  const int64_t values = height * width * channels;
  expect(values < (1 << 30), "images must be of fewer than 2^30 values each, got ", values);
  expect(batch < INT32_MAX, "indices must be fewer than 2^31 - 1, got ", batch);
  expect("indices", indices, I64, {-1}, images);
  expect("crops", crops, I64, {batch, 3}, images);
  expect("scale", scale, F32, {channels}, images);
  expect("shift", shift, F32, {channels}, images);
  expect(dtype == F32 || dtype == BF16, "dtype must be Float or BFloat16, got ", dtype);
  expect_range("indices", indices, count);
  const Tensor out = torch::stable::empty({batch, channels, height, width}, dtype, std::nullopt,
                                          images.device(), std::nullopt,
                                          torch::headeronly::MemoryFormat::ChannelsLast);
  if (out.numel() > 0)
    dispatch(Augment{data<uint8_t>(images), data<int64_t>(indices), data<int64_t>(crops),
                     data<float>(scale), data<float>(shift), out.data_ptr(), dtype == BF16, count,
                     batch, height, width, channels},
             images);
  return out;
}

// x and what has its shape, type and layout, each under its name.
void expect_images(const Tensor& x, std::initializer_list<std::pair<const char*, Tensor>> others) {
  const auto type = x.scalar_type() == BF16 ? BF16 : F32;
  expect("x", x, type, {-1, -1, -1, -1}, x, true);
  expect(x.numel() > x.size(1), "x must be of more than one value a channel");
  for (const auto& [argument, t] : others) expect(argument, t, type, x.sizes(), x, true);
}

Sums* partial_sums(std::optional<Tensor>& scratch, const Tensor& x) {
  if (!on_gpu(x)) return nullptr;  // on the CPU the loops have their own
  scratch = torch::stable::new_empty(x, {PARTS, x.size(1), 2}, ScalarType::Double);
  return data<Sums>(*scratch);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_forward(
    Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, std::optional<Tensor> residual, double momentum, double eps,
    bool relu) {
  expect_images(x, {{"residual", residual.value_or(x)}});
  const int64_t channels = x.size(1);
  expect("weight", weight, F32, {channels}, x);
  expect("bias", bias, F32, {channels}, x);
  expect(running_mean.has_value() == running_var.has_value(),
         "running_mean and running_var must both be given, or neither");
  if (running_mean) {
    expect("running_mean", *running_mean, F32, {channels}, x);
    expect("running_var", *running_var, F32, {channels}, x);
  }
  const Tensor y = torch::stable::empty_like(x), mean = floats(x, channels),
               rstd = floats(x, channels);
  std::optional<Tensor> scratch;
  dispatch(BatchNorm{x.data_ptr(), residual ? residual->data_ptr() : nullptr, y.data_ptr(),
                     x.scalar_type() == BF16, data<float>(weight), data<float>(bias),
                     running_mean ? data<float>(*running_mean) : nullptr,
                     running_var ? data<float>(*running_var) : nullptr, data<float>(mean),
                     data<float>(rstd), partial_sums(scratch, x), x.numel() / channels, channels,
                     momentum, eps, relu ? 0.0f : NAN},
           x);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_backward(
    Tensor dy, Tensor x, std::optional<Tensor> y, Tensor weight, Tensor bias, Tensor mean,
    Tensor rstd, bool relu) {
  expect_images(x, {{"dy", dy}, {"y", y.value_or(x)}});
  expect(relu || !y, "y must be given with relu only");
  const int64_t channels = x.size(1);
  for (const Tensor* t : {&weight, &bias, &mean, &rstd})
    expect("weight, bias, mean and rstd", *t, F32, {channels}, x);
  const Tensor dx = torch::stable::empty_like(x),
               dresidual = y ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0}),
               dweight = floats(x, channels), dbias = floats(x, channels);
  std::optional<Tensor> scratch;
  dispatch(BatchNormBackward{dy.data_ptr(), x.data_ptr(), y ? y->data_ptr() : nullptr,
                             dx.data_ptr(), y ? dresidual.data_ptr() : nullptr,
                             x.scalar_type() == BF16, data<float>(weight), data<float>(bias),
                             data<float>(mean), data<float>(rstd), data<float>(dweight),
                             data<float>(dbias), partial_sums(scratch, x), x.numel() / channels,
                             channels, relu ? 0.0f : NAN},
           x);
  return {dx, dweight, dbias, dresidual};
}

}  // namespace datadiet

STABLE_TORCH_LIBRARY(datadiet, m) {
  m.def(
      "masked_sgd_(Tensor(a!) weights, Tensor(b!) momentum, Tensor(c!) gradient, Tensor mask, "
      "Tensor lr, float mu, float weight_decay, Tensor(d!)? weights_bf16=None) -> ()");
  m.def("example_losses(Tensor logits, Tensor labels) -> (Tensor, Tensor, Tensor)");
  m.def(
      "loss_barrier(Tensor middle, Tensor first, Tensor second, Tensor labels, float alpha=0.5) -> "
      "(Tensor, Tensor)");
  m.def(
      "augment(Tensor images, Tensor indices, Tensor crops, Tensor scale, Tensor shift, "
      "ScalarType dtype=float) -> Tensor");
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
#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(datadiet, CUDA, m) { REGISTER(m); }
#endif
