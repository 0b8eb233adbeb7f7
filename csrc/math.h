// The arithmetic of the four operations, once, for the host (ops.cpp) and the device (ops.cu).
//
// Both are compiled without contraction into fused multiply-adds (-ffp-contract=off, -fmad=false),
// so masked_sgd_ and augment give the same bits on every CPU and every card. In the losses the
// exponential and the order of the sums differ between the two, by an ulp or so.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HD __host__ __device__ __forceinline__
#else
#define HD inline __attribute__((always_inline))
#endif

namespace datadiet {

// ---- 16-bit floats ------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
HD To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

HD double value(double x) { return x; }
HD float value(float x) { return x; }
HD float value(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
HD float value(f16 x) {  // exact, subnormals too: the exponent is re-biased by a multiplication
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const float finite = bit_cast<float>(magnitude) * 0x1p112f;
  const bool is_finite = magnitude < 0x0f800000u;
  const uint32_t bits = is_finite ? bit_cast<uint32_t>(finite) : magnitude | 0x7f800000u;
  return bit_cast<float>(bits | uint32_t(x.bits & 0x8000) << 16);
}

HD void put(float& to, float x) { to = x; }
HD void put(bf16& to, float x) {  // to nearest, ties to even; every NaN becomes the quiet one
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to.bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

// ---- masked SGD of one weight -------------------------------------------------------------------

// A pruned weight is selected to 0, not multiplied: 0 * inf is not 0 and -1 * 0 is not +0.
HD void sgd(float& w, float& m, float g, bool alive, float lr, float mu, float weight_decay) {
  const float velocity = mu * m + (g + weight_decay * w);
  const float moved = w - lr * velocity;
  m = alive ? velocity : 0.0f;
  w = alive ? moved : 0.0f;
}

// ---- loss, error and EL2N norm of one row of logits ---------------------------------------------

// e^x for x <= 0 or NaN; below -87.3, where float32 has no full precision, 0.
HD float exp_nonpositive(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  // Cephes: e^x = 2^n e^r with |r| < ln(2) / 2. Adding 1.5 * 2^23 rounds to an integer.
  const float clamped = x < -87.3f ? -87.3f : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  const float power = bit_cast<float>((bit_cast<uint32_t>(shifted) + 127u) << 23);
  return x < -87.3f ? 0.0f : p * power;
#endif
}
HD double exp_nonpositive(double x) { return std::exp(x); }

// First pass over a row: its maximum, and whether another class beats the label's logit `own` (the
// first of equals wins, as in argmax; any comparison with a NaN counts as beaten).
template <class T>
HD void see_logit(T x, T own, bool before_label, T& top, int& error) {
  top = x > top ? x : top;
  error |= int(!(x <= own)) | (int(before_label) & int(x == own));
}

// Second pass: the sums over the classes that are not the label. Leaving the label out spares
// 1 - p[label] its cancellation in both results; adding in groups spares many small terms the
// rounding against a large sum.
constexpr int GROUP = 8;

template <class T>
HD void add_logit(T x, T top, bool is_label, T& others, T& squares) {
  const T e = is_label ? T(0) : exp_nonpositive(x - top);
  others += e;
  squares += e * e;
}

// -log p[label] and ||p - onehot||: with z the sum of all e^(x - top), p[label] = e_label / z,
// 1 - p[label] = others / z and the other p are e / z.
template <class T>
HD void finish_row(T top, T own, T others, T squares, T& loss, T& norm) {
  using std::log1p, std::sqrt;  // in the precision of T
  const T below = top - own;
  const T e_label = exp_nonpositive(own - top);
  loss = below + log1p(others + (e_label - T(1)));
  norm = sqrt(squares + others * others) / (others + e_label);
}

template <class T>
HD T barrier(T middle, T first, T second, T alpha) {
  return middle - ((T(1) - alpha) * first + alpha * second);
}

template <class T>
HD T supremum(T a, T b) {  // a NaN wins, as in amax
  return b > a || b != b ? b : a;
}

// ---- Philox 4x32-10 (Salmon et al. 2011), and the crop it draws ---------------------------------

struct Words {
  uint32_t w[4];
};

HD Words philox(uint32_t k0, uint32_t k1, Words c) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c.w[0]) * 0xD2511F53u, p1 = uint64_t(c.w[2]) * 0xCD9E8D57u;
    c = {{uint32_t(p1 >> 32) ^ c.w[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w[3] ^ k1,
          uint32_t(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

struct Crop {
  int64_t up, left;  // the crop's corner in the image, from -pad to pad
  bool mirrored;
};

HD Crop draw_crop(const int64_t* key, int64_t step, int64_t slot, int64_t pad, bool flip) {
  const Words random =
      philox(uint32_t(key[0]), uint32_t(key[1]), {{uint32_t(slot), uint32_t(step), 0u, 0u}});
  const uint64_t places = uint64_t(2 * pad + 1);
  return {int64_t(random.w[0] * places >> 32) - pad, int64_t(random.w[1] * places >> 32) - pad,
          flip && (random.w[2] & 1u)};
}

HD float normalise(uint8_t pixel, float scale, float shift) { return float(pixel) * scale + shift; }

// ---- what ops.cpp hands to the loops of a device ------------------------------------------------

enum class Type { f32, f64, f16, bf16 };

struct Sgd {
  float *weights, *momentum;  // (rows, columns), as gradient and low
  void* gradient;
  Type gradient_type;
  const uint8_t* mask;  // (rows, prunable)
  const float* lr;
  bool lr_per_row;
  float mu, weight_decay;
  bf16* low;  // or null
  int64_t rows, columns, prunable;
};

struct Losses {
  const void* logits;  // (n, classes)
  Type type;
  const int64_t* labels;
  void *loss, *error, *norm;  // (n,)
  int64_t n, classes;
};

struct Barrier {
  const void *middle, *first, *second;  // (alphas, n, classes), (n, classes) twice
  Type type;
  const int64_t* labels;
  const float* alpha;
  void *loss, *error, *top_loss, *top_error;  // (alphas, n) twice, (n,) twice
  int64_t alphas, n, classes;
};

struct Augment {
  const uint8_t* images;  // (count, height, width, channels)
  const int64_t *indices, *key, *step;
  const float *scale, *shift;
  void* out;  // (batch, height, width, channels)
  Type type;
  int64_t count, batch, height, width, channels, pad;
  bool flip;
};

// Each returns null, or why the launch failed.
const char* launch(const Sgd&, void* stream);
const char* launch(const Losses&, void* stream);
const char* launch(const Barrier&, void* stream);
const char* launch(const Augment&, void* stream);

}  // namespace datadiet
