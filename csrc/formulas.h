// The arithmetic of the four operations, once, for the host (ops.cpp) and the device (ops.cu).
//
// Both are compiled without contraction into fused multiply-adds (-ffp-contract=off, -fmad=false),
// so masked_sgd_ and augment are bit-identical on every CPU and GPU. In the losses the exponential
// and the order of the sums differ between CPU and GPU, by an ulp or so.
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

// ---- bfloat16 -----------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};

template <class To, class From>
HD To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

HD float value(float x) { return x; }
HD float value(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

HD void put(float& to, float x) { to = x; }
HD void put(bf16& to, float x) {  // to nearest, ties to even; every NaN becomes the quiet one
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to.bits = uint16_t(x != x ? 0x7fc0u : rounded);
}

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

// The N values at p, which must be aligned to all of them: one access on a GPU. nvcc splits such a
// store into its values when they are assigned, so it is spelled out (p lies in global memory).
template <int N, class T>
HD Pack<T, N> read_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <int N, class T>
HD void write_pack(T* p, const Pack<T, N>& values) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof values == 16) {
    const uint4 x = bit_cast<uint4>(values);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z),
                 "r"(x.w)
                 : "memory");
    return;
  }
  if constexpr (sizeof values == 8) {
    const uint2 x = bit_cast<uint2>(values);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(x.x), "r"(x.y) : "memory");
    return;
  }
#endif
  *reinterpret_cast<Pack<T, N>*>(p) = values;
}

// ---- masked SGD of one weight -------------------------------------------------------------------

// x or +0, by its bits: 0 * inf is not 0, and -1 * 0 is not +0. Of `keep ? x : 0` g++ makes a branch
// where there is no AVX-512, and does not vectorise the loop around it (20 times slower).
HD float keep_if(bool keep, float x) {
  return bit_cast<float>(bit_cast<uint32_t>(x) & (0u - uint32_t(keep)));
}

HD void sgd(float& w, float& m, float g, bool alive, float lr, float mu, float weight_decay) {
  const float velocity = mu * m + (g + weight_decay * w);
  const float moved = w - lr * velocity;
  m = keep_if(alive, velocity);
  w = keep_if(alive, moved);
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

// First pass over a row: its maximum, and whether another class beats the label's logit `own` (the
// first of equals wins, as in argmax; any comparison with a NaN counts as beaten).
HD void see_logit(float x, float own, bool before_label, float& top, int& error) {
  top = x > top ? x : top;
  error |= int(!(x <= own)) | (int(before_label) & int(x == own));
}

// Second pass: the sums over the classes that are not the label. Leaving the label out spares
// 1 - p[label] its cancellation in both results; adding in groups spares many small terms the
// rounding against a large sum.
constexpr int GROUP = 8;

HD void add_logit(float x, float top, bool is_label, float& others, float& squares) {
  const float e = is_label ? 0.0f : exp_nonpositive(x - top);
  others += e;
  squares += e * e;
}

// -log p[label] and ||p - onehot||: with z the sum of all e^(x - top), p[label] = e_label / z,
// 1 - p[label] = others / z and the other p are e / z.
HD void finish_row(float top, float own, float others, float squares, float& loss, float& norm) {
  using std::log1p, std::sqrt;  // in float32
  const float below = top - own;
  const float e_label = exp_nonpositive(own - top);
  loss = below + log1p(others + (e_label - 1.0f));
  norm = sqrt(squares + others * others) / (others + e_label);
}

HD float barrier(float middle, float first, float second, float alpha) {
  return middle - ((1.0f - alpha) * first + alpha * second);
}

// ---- what ops.cpp hands to the loops of a device ------------------------------------------------

struct Sgd {
  float *weights, *momentum, *gradient;  // (rows, columns), as weights_bf16
  const uint8_t* mask;                   // (rows, prunable)
  const float* lr;                       // (1,)
  float mu, weight_decay;
  bf16* weights_bf16;  // or null
  int64_t rows, columns, prunable;
};

struct Losses {
  const float* logits;  // (n, classes)
  const int64_t* labels;
  float *loss, *error, *norm;  // (n,)
  int64_t n, classes;
};

struct Barrier {
  const float *middle, *first, *second;  // (n, classes)
  const int64_t* labels;
  float alpha;
  float *loss, *error;  // (n,)
  int64_t n, classes;
};

struct Augment {
  const uint8_t* images;           // (count, height, width, channels)
  const int64_t *indices, *crops;  // (batch,) and (batch, 3) of up, left, mirrored
  const float *scale, *shift;      // (channels,)
  void* out;                       // (batch, height, width, channels), float or bf16
  bool is_bf16;
  int64_t count, batch, height, width, channels;
};

// ---- augmentation -------------------------------------------------------------------------------

// Where pixel (y, x) of example b comes from, cropped and flipped; null in the black border.
HD const uint8_t* source(const Augment& a, int64_t b, int y, int x) {
  const int64_t* const crop = a.crops + 3 * b;
  const int64_t from_y = y + crop[0], from_x = (crop[2] > 0 ? a.width - 1 - x : x) + crop[1];
  if (from_y < 0 || from_y >= a.height || from_x < 0 || from_x >= a.width) return nullptr;
  return a.images + ((a.indices[b] * a.height + from_y) * a.width + from_x) * a.channels;
}

HD float normalise(uint8_t pixel, float scale, float shift) { return float(pixel) * scale + shift; }

// Each returns null, or CUDA's message.
const char* launch(const Sgd&, void* stream);
const char* launch(const Losses&, void* stream);
const char* launch(const Barrier&, void* stream);
const char* launch(const Augment&, void* stream);

}  // namespace datadiet
