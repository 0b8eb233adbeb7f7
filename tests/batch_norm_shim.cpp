// BatchNorm's kernels for a card, run on the CPU, against its loops for the CPU.
#include "ops_on_cpu.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

using namespace datadiet;

std::mt19937 generator(1);

template <class T>
std::vector<T> draw(int64_t n, float shift) {
  std::normal_distribution<float> normal(shift, 2);
  std::vector<T> x(n);
  for (T& v : x) put(v, normal(generator));
  return x;
}

template <class T>
void close(const char* what, const std::vector<T>& a, const std::vector<T>& b, float scale) {
  const float tolerance = scale * (sizeof(T) == 2 ? 1e-2f : 2e-6f);
  for (size_t i = 0; i < a.size(); ++i) {
    const float x = value(a[i]), y = value(b[i]);
    if (!(std::fabs(x - y) <= tolerance * (1 + std::fabs(y)))) {
      printf("%s: %g, on the CPU %g, at %zu\n", what, x, y, i);
      exit(1);
    }
  }
}

const auto serial = [](int64_t n, const auto& body) { body(0, n); };

template <class T>
void test(int64_t pixels, int64_t channels, bool adds, bool relu) {
  const int64_t n = pixels * channels;
  const auto x = draw<T>(n, 3), residual = draw<T>(n, 0), dy = draw<T>(n, 0);
  const auto weight = draw<float>(channels, 1), bias = draw<float>(channels, 0);
  std::vector<Sums> partial(PARTS * channels);
  struct Result {
    std::vector<T> y, dx, dresidual;
    std::vector<float> running_mean, running_var, mean, rstd, dweight, dbias;
  } results[2];
  for (int i = 0; i < 2; ++i) {
    Result& r = results[i];
    r.y = r.dx = r.dresidual = std::vector<T>(n);
    r.running_mean = r.running_var = r.mean = r.rstd = r.dweight = r.dbias =
        std::vector<float>(channels);
    const bool masks = adds && relu;
    const BatchNorm forward{x.data(), adds ? residual.data() : nullptr, r.y.data(), sizeof(T) == 2,
                            weight.data(), bias.data(), r.running_mean.data(),
                            r.running_var.data(), r.mean.data(), r.rstd.data(), partial.data(),
                            pixels, channels, 0.1, 1e-5, relu};
    if (i == 0) launch(forward, nullptr);
    else run_batch_norm(forward, serial);
    const Result& of = results[0];  // one y for both, so that no mask differs
    const BatchNormBackward backward{dy.data(), x.data(), masks ? of.y.data() : nullptr,
                                     r.dx.data(), masks ? r.dresidual.data() : nullptr,
                                     sizeof(T) == 2, weight.data(), bias.data(), of.mean.data(),
                                     of.rstd.data(), r.dweight.data(), r.dbias.data(),
                                     partial.data(), pixels, channels, relu};
    if (i == 0) launch(backward, nullptr);
    else run_batch_norm(backward, serial);
  }
  const Result &a = results[0], &b = results[1];
  const float many = std::sqrt(float(pixels));
  close("mean", a.mean, b.mean, 1);
  close("rstd", a.rstd, b.rstd, 1);
  close("running_mean", a.running_mean, b.running_mean, 1);
  close("running_var", a.running_var, b.running_var, 1);
  close("y", a.y, b.y, 4);
  close("dx", a.dx, b.dx, 4);
  close("dresidual", a.dresidual, b.dresidual, 1);
  close("dweight", a.dweight, b.dweight, 4 * many);
  close("dbias", a.dbias, b.dbias, 4 * many);
}

int main() {
  const int64_t shapes[][2] = {{2, 1}, {35, 3}, {1100, 16}, {301, 64}, {77, 20}, {40, 100},
                               {70, 33}, {9000, 8}};
  for (const auto& [pixels, channels] : shapes)
    for (int flags = 0; flags < 4; ++flags) {
      test<float>(pixels, channels, flags & 1, flags & 2);
      test<bf16>(pixels, channels, flags & 1, flags & 2);
    }
  test<float>(140000, 4, true, true);  // more than PARTS blocks
}
