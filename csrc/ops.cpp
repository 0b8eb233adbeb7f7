// The schemas of torch.ops.datadiet, the checks of their arguments, and the loops for the CPU.
//
// Only torch's stable ABI is included (torch 2.11 and newer): it compiles in 3 s where the full
// headers take most of a minute. No result depends on the number of threads, on the memory's
// alignment, or on which rows lie beside.
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

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n > 0) torch::stable::parallel_for(0, n, std::max<int64_t>(grain, 1), body);
}

// ---- loops for the CPU --------------------------------------------------------------------------

template <bool MASKED, bool LOW>
void sgd_span(float* __restrict w, float* __restrict m, float* __restrict g,
              const uint8_t* __restrict mask, bf16* __restrict low, int64_t n, float lr, float mu,
              float weight_decay) {
  for (int64_t i = 0; i < n; ++i) {
    float weight = w[i], velocity = m[i];
    sgd(weight, velocity, g[i], MASKED ? mask[i] != 0 : true, lr, mu, weight_decay);
    w[i] = weight;
    m[i] = velocity;
    g[i] = 0;
    if constexpr (LOW) put(low[i], weight);
  }
}

template <bool LOW>
void sgd_loop(const Sgd& a) {
  parallel_for(a.rows * a.columns, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t row = at / a.columns, i = at % a.columns;
      const bool masked = i < a.prunable;
      const int64_t n = std::min((masked ? a.prunable : a.columns) - i, end - at);
      (masked ? sgd_span<true, LOW> : sgd_span<false, LOW>)(
          a.weights + at, a.momentum + at, a.gradient + at, a.mask + row * a.prunable + i,
          a.low + (LOW ? at : 0), n, a.lr[0], a.mu, a.weight_decay);
      at += n;
    }
  });
}

void run(const Sgd& a) { (a.low ? sgd_loop<true> : sgd_loop<false>)(a); }

constexpr int ROWS = 32;  // rows side by side, one a vector lane: a row's sums are its own
constexpr int CHUNK = 128;  // classes in the tile at a time

// Kept from the vectoriser, which would scatter.
__attribute__((noinline, optimize("no-tree-vectorize"))) void transpose(const float* x,
                                                                       int64_t pitch, int n,
                                                                       int width,
                                                                       float (*tile)[ROWS]) {
  for (int r = 0; r < ROWS; ++r) {
    const float* row = x + std::min(r, n - 1) * pitch;  // lanes past the end repeat the last row
    for (int c = 0; c < width; ++c) tile[c][r] = row[c];
  }
}

void losses_of_rows(const float* x, const int64_t* labels, int64_t classes, int n, float* loss,
                    float* error, float* norm) {
  float tile[CHUNK][ROWS], top[ROWS], own[ROWS], others[ROWS] = {}, squares[ROWS] = {};
  int32_t label[ROWS], wrong[ROWS] = {};
  const auto load = [&](int64_t from) {
    const int width = int(std::min<int64_t>(CHUNK, classes - from));
    transpose(x + from, classes, n, width, tile);
    return width;
  };
  for (int r = 0; r < ROWS; ++r) {
    const int row = std::min(r, n - 1);
    label[r] = int32_t(labels[row]);
    own[r] = x[row * classes + label[r]];
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
    float part[ROWS] = {}, part_squares[ROWS] = {};
    for (int group = 0; group < width; group += GROUP) {
      float sum[ROWS] = {}, sum_squares[ROWS] = {};
      for (int c = group; c < std::min(group + GROUP, width); ++c)
        for (int r = 0; r < ROWS; ++r)
          add_logit(tile[c][r], top[r], int32_t(from + c) == label[r], sum[r], sum_squares[r]);
      for (int r = 0; r < ROWS; ++r) part[r] += sum[r], part_squares[r] += sum_squares[r];
    }
    for (int r = 0; r < ROWS; ++r) others[r] += part[r], squares[r] += part_squares[r];
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
  const int64_t line = a.width * a.channels, image = a.height * line;
  std::vector<float> scale(line), shift(line);  // repeated along a line, so that it is one loop
  for (int64_t i = 0; i < line; ++i) {
    scale[i] = a.scale[i % a.channels];
    shift[i] = a.shift[i % a.channels];
  }
  parallel_for(a.batch, (1 << 14) / std::max<int64_t>(image, 1), [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> pixels(line);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t up = a.crops[3 * b], left = a.crops[3 * b + 1];
      const bool mirrored = a.crops[3 * b + 2] > 0;
      for (int64_t y = 0; y < a.height; ++y) {
        const int64_t from_y = y + up;
        std::fill(pixels.begin(), pixels.end(), uint8_t(0));
        if (from_y >= 0 && from_y < a.height) {
          const uint8_t* from = a.images + a.indices[b] * image + from_y * line;
          for (int64_t x = 0; x < a.width; ++x) {
            const int64_t from_x = (mirrored ? a.width - 1 - x : x) + left;
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

void run(const Augment& a) { (a.half ? augment_loop<bf16> : augment_loop<float>)(a); }

// ---- the operations -----------------------------------------------------------------------------

template <class Arguments>
void dispatch(const Arguments& a, [[maybe_unused]] const Tensor& beside) {
#ifdef USE_CUDA
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

constexpr auto F32 = ScalarType::Float, BF16 = ScalarType::BFloat16, I64 = ScalarType::Long;

void masked_sgd_(Tensor weights, Tensor momentum, Tensor gradient, Tensor mask, Tensor lr,
                 double mu, double weight_decay, std::optional<Tensor> low) {
  expect("weights", weights, {F32}, {-1, -1}, weights);
  const int64_t rows = weights.size(0), columns = weights.size(1);
  expect("momentum", momentum, {F32}, {rows, columns}, weights);
  expect("gradient", gradient, {F32}, {rows, columns}, weights);
  expect("mask", mask, {ScalarType::Bool}, {rows, -1}, weights);
  expect("mask", mask.size(1) <= columns, "no wider than weights", mask.size(1));
  expect("lr", lr, {F32}, {1}, weights);
  if (low) expect("low", *low, {BF16}, {rows, columns}, weights);
  if (rows * columns == 0) return;
  dispatch(Sgd{data<float>(weights), data<float>(momentum), data<float>(gradient),
               data<uint8_t>(mask), data<float>(lr), float(mu), float(weight_decay),
               low ? data<bf16>(*low) : nullptr, rows, columns, mask.size(1)},
           weights);
}

void check_logits(const char* argument, const Tensor& logits, const Tensor& labels) {
  expect(argument, logits, {F32}, {-1, -1}, logits);
  const int64_t n = logits.size(0), classes = logits.size(1);
  expect(argument, classes > 0 && classes < (1 << 30), "of 1 to 2^30 - 1 classes", classes);
  expect("labels", labels, {I64}, {n}, logits);
  if (logits.is_cpu()) check_range("labels", data<int64_t>(labels), n, classes);
}

std::tuple<Tensor, Tensor, Tensor> example_losses(Tensor logits, Tensor labels) {
  check_logits("logits", logits, labels);
  const int64_t n = logits.size(0);
  const Tensor loss = torch::stable::new_empty(logits, {n}),
               error = torch::stable::new_empty(logits, {n}),
               norm = torch::stable::new_empty(logits, {n});
  if (n > 0)
    dispatch(Losses{data<float>(logits), data<int64_t>(labels), data<float>(loss),
                    data<float>(error), data<float>(norm), n, logits.size(1)},
             logits);
  return {loss, error, norm};
}

std::tuple<Tensor, Tensor> loss_barrier(Tensor middle, Tensor first, Tensor second, Tensor labels,
                                        double alpha) {
  check_logits("middle", middle, labels);
  const int64_t n = middle.size(0), classes = middle.size(1);
  expect("first", first, {F32}, {n, classes}, middle);
  expect("second", second, {F32}, {n, classes}, middle);
  const Tensor loss = torch::stable::new_empty(middle, {n}),
               error = torch::stable::new_empty(middle, {n});
  if (n > 0)
    dispatch(Barrier{data<float>(middle), data<float>(first), data<float>(second),
                     data<int64_t>(labels), float(alpha), data<float>(loss), data<float>(error), n,
                     classes},
             middle);
  return {loss, error};
}

Tensor augment(Tensor images, Tensor indices, Tensor crops, Tensor scale, Tensor shift,
               ScalarType dtype) {
  expect("images", images, {ScalarType::Byte}, {-1, -1, -1, -1}, images);
  const int64_t count = images.size(0), height = images.size(1), width = images.size(2),
                channels = images.size(3), batch = indices.numel();
  expect("images", height * width * channels < (1 << 30), "of fewer than 2^30 values an image",
         height * width * channels);
  expect("indices", indices, {I64}, {-1}, images);
  expect("crops", crops, {I64}, {batch, 3}, images);
  expect("scale", scale, {F32}, {channels}, images);
  expect("shift", shift, {F32}, {channels}, images);
  if (dtype != F32 && dtype != BF16)
    throw std::runtime_error("dtype must be float32 or bfloat16, got " + name(dtype));
  expect("indices", batch < INT32_MAX, "fewer than 2^31 - 1", batch);
  if (images.is_cpu()) check_range("indices", data<int64_t>(indices), batch, count);
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

}  // namespace datadiet

STABLE_TORCH_LIBRARY(datadiet, m) {
  m.def(
      "masked_sgd_(Tensor(a!) weights, Tensor(b!) momentum, Tensor(c!) gradient, Tensor mask, "
      "Tensor lr, float mu, float weight_decay, Tensor(d!)? low=None) -> ()");
  m.def("example_losses(Tensor logits, Tensor labels) -> (Tensor, Tensor, Tensor)");
  m.def(
      "loss_barrier(Tensor middle, Tensor first, Tensor second, Tensor labels, float alpha=0.5) -> "
      "(Tensor, Tensor)");
  m.def(
      "augment(Tensor images, Tensor indices, Tensor crops, Tensor scale, Tensor shift, "
      "ScalarType dtype=float) -> Tensor");
}

#define REGISTER(m)                                               \
  m.impl("masked_sgd_", TORCH_BOX(&datadiet::masked_sgd_));       \
  m.impl("example_losses", TORCH_BOX(&datadiet::example_losses)); \
  m.impl("loss_barrier", TORCH_BOX(&datadiet::loss_barrier));     \
  m.impl("augment", TORCH_BOX(&datadiet::augment))

STABLE_TORCH_LIBRARY_IMPL(datadiet, CPU, m) { REGISTER(m); }
#ifdef USE_CUDA
STABLE_TORCH_LIBRARY_IMPL(datadiet, CUDA, m) { REGISTER(m); }
#endif
