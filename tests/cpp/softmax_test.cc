#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/cpp/harness.h"

namespace zenith::test {

void TestSoftmax(const CpuKernels& kernels, Report& report) {
  Pool pool(4);
  const Launch launch = pool.launch();
  const double inf = std::numeric_limits<double>::infinity();
  for (const DType dtype : kDTypes) {
    std::mt19937_64 random(2);
    Error forward, backward, sum_to_one;
    for (const int64_t cols : {0, 1, 2, 5, 8, 13, 16, 17, 33, 63, 64, 65, 130, 1000, 4097}) {
      const int64_t rows = 37;
      const int64_t size = rows * cols;
      std::vector<double> values = RandomValues(random, size, 30.0);
      if (cols > 4) {
        std::fill_n(values.begin(), cols, -inf);                          // row 0
        values[static_cast<size_t>(cols + 2)] = std::nan("");             // row 1
        values[static_cast<size_t>(2 * cols + 1)] = -inf;                 // row 2
        std::fill_n(values.begin() + 3 * cols, cols, 1000.0);             // row 3
        values[static_cast<size_t>(4 * cols + cols - 1)] = std::nan("");  // row 4: in the tail
      }
      const Tensor x(dtype, values), dy(dtype, RandomValues(random, size, 30.0));
      Tensor y(dtype, size), dx(dtype, size);
      const Status status =
          kernels.softmax_forward({dtype, rows, cols, x.data(), y.data()}, launch);
      report.Require(status.ok(), "softmax forward returns ok");
      (void)kernels.softmax_backward({dtype, rows, cols, y.data(), dy.data(), dx.data()}, launch);
      for (int64_t row = 0; row < rows; ++row) {
        double max = -inf, sum = 0, dot = 0, magnitude = 0;
        for (int64_t i = row * cols; i < (row + 1) * cols; ++i) max = std::fmax(max, x[i]);
        for (int64_t i = row * cols; i < (row + 1) * cols; ++i) {
          sum += std::exp(x[i] - max);
          dot += y[i] * dy[i];
          magnitude += std::fabs(y[i] * dy[i]);
        }
        for (int64_t i = row * cols; i < (row + 1) * cols; ++i) {
          const double want = std::exp(x[i] - max) / sum;
          forward.Add(y, i, want, want * (1 + std::fabs(x[i] - max) / 8));
          backward.Add(dx, i, y[i] * (dy[i] - dot), y[i] * (std::fabs(dy[i]) + magnitude));
        }
      }
    }
    const double limit = dtype == DType::kF32 ? 4.0 : 0.6;
    report.Add("softmax forward", kernels, dtype, forward.max(), limit);
    report.Add("softmax backward", kernels, dtype, backward.max(), limit);
  }
}

void TimeSoftmax(const CpuKernels& kernels, const Launch& launch, Report& report) {
  std::mt19937_64 random(2);
  for (const DType dtype : kDTypes) {
    for (const int64_t cols : {16, 1024, 50304}) {
      const int64_t rows = 4 * 1024 * 1024 / cols, size = rows * cols;
      const Tensor x(dtype, RandomValues(random, size)), dy(dtype, RandomValues(random, size));
      Tensor y(dtype, size), dx(dtype, size);
      const std::string shape = std::to_string(rows) + "x" + std::to_string(cols);
      const double gb = static_cast<double>(size) * (dtype == DType::kF32 ? 4 : 2) * 1e-6;
      const double forward = BestTime(
          [&] { (void)kernels.softmax_forward({dtype, rows, cols, x.data(), y.data()}, launch); });
      report.Time("softmax " + shape, kernels, dtype, forward, 2 * gb / forward, "GB/s");
      const double backward = BestTime([&] {
        (void)kernels.softmax_backward({dtype, rows, cols, y.data(), dy.data(), dx.data()}, launch);
      });
      report.Time("softmax backward " + shape, kernels, dtype, backward, 3 * gb / backward, "GB/s");
    }
  }
}

}  // namespace zenith::test
