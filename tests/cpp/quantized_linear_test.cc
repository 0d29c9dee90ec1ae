#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>

#include "tests/cpp/harness.h"

namespace zenith::test {
namespace {

struct Case {
  int32_t bits;
  bool transposed, float_params;
  int64_t rows, k, n, groups;
};

double TestCase(const CpuKernels& kernels, DType dtype, const Case& c, const Launch& launch,
                Report& report) {
  std::mt19937_64 random(5);
  std::vector<double> values = RandomValues(random, c.rows * c.k);
  if (c.rows > 3) values[c.k] = std::nan("");
  const Tensor x(dtype, values);
  const DType param_dtype = c.float_params ? DType::kF32 : dtype;
  const Tensor scale(param_dtype, RandomValues(random, c.groups * c.n));
  const Tensor bias(param_dtype, RandomValues(random, c.n));
  const int count = 1 << c.bits;
  std::vector<int> w(static_cast<size_t>(c.k * c.n));
  std::vector<char> bytes(static_cast<size_t>(c.k * c.n * c.bits / 8));  // to the byte
  for (size_t i = 0; i < w.size(); ++i) {
    w[i] = static_cast<int>(random() % count) - count / 2;
    if (c.bits == 8) {
      bytes[i] = static_cast<char>(w[i]);
    } else {
      bytes[i / 2] = static_cast<char>(bytes[i / 2] | (w[i] & 15) << (i % 2 * 4));
    }
  }
  const auto run = [&](const Launch& on, Tensor& y, int64_t rows, bool has_bias) {
    const Status status = kernels.quantized_linear(
        {dtype, param_dtype, c.bits, c.transposed, rows, c.k, c.n, c.groups, x.data(), bytes.data(),
         scale.data(), has_bias ? bias.data() : nullptr, y.data()},
        on);
    report.Require(status.ok(), "a quantised linear layer returns ok");
  };
  Tensor y(dtype, c.rows * c.n), alone(dtype, c.rows * c.n), first(dtype, c.n);
  run(launch, y, c.rows, true);
  run({nullptr, 1, nullptr}, alone, c.rows, true);
  report.Require(y.SameBits(alone), "a quantised linear layer does not depend on threads");
  run(launch, first, 1, true);
  bool same = true;
  for (int64_t j = 0; j < c.n; ++j) same &= first[j] == y[j];
  report.Require(same, "a row of a quantised linear layer does not depend on the others");

  Error error;
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.n; ++j) {
      double sum = bias[j], magnitude = std::fabs(bias[j]);
      for (int64_t k = 0; k < c.k; ++k) {
        const double weight = w[static_cast<size_t>(c.transposed ? j * c.k + k : k * c.n + j)];
        const double term = x[i * c.k + k] * weight * scale[k / (c.k / c.groups) * c.n + j];
        sum += term;
        magnitude += std::fabs(term);
      }
      if (std::isnan(sum)) magnitude = 1;
      error.Add(y, i * c.n + j, sum, magnitude);
    }
  }
  return error.max();
}

}  // namespace

void TestQuantizedLinear(const CpuKernels& kernels, Report& report) {
  Pool pool(3);
  const Launch launch = pool.launch();
  for (const DType dtype : kDTypes) {
    double worst = 0;
    // Rows of every tile; whole and partial vectors, panels and tasks; groups of any size.
    for (const int32_t bits : {8, 4}) {
      for (const bool transposed : {false, true}) {
        for (const int64_t rows : {1, 2, 3, 7}) {
          for (const auto& [k, n, groups] : std::initializer_list<std::array<int64_t, 3>>{
                   {2, 2, 1}, {36, 16, 9}, {130, 64, 1}, {256, 130, 4}, {64, 300, 1}}) {
            const Case c{bits, transposed, rows % 2 == 0, rows, k, n, groups};
            worst = std::max(worst, TestCase(kernels, dtype, c, launch, report));
          }
        }
      }
    }
    // A sum of k terms in order is off by k / 2 ulp of their magnitudes at most, and by far less.
    report.Add("quantized linear", kernels, dtype, worst, 4);
  }
}

}  // namespace zenith::test
