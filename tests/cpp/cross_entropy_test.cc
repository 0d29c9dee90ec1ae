#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/cpp/harness.h"

namespace zenith::test {

void TestCrossEntropy(const CpuKernels& kernels, Report& report) {
  Pool pool(4);
  const Launch launch = pool.launch();
  const double inf = std::numeric_limits<double>::infinity();
  for (const DType dtype : kDTypes) {
    std::mt19937_64 random(6);
    Error lse_error, total_error, backward;
    bool picked_is_exact = true;
    for (const int64_t cols : {1, 2, 5, 8, 13, 16, 17, 33, 64, 65, 130, 1000, 4097, 50257}) {
      const int64_t rows = cols > 5000 ? 7 : 37, size = rows * cols;
      std::vector<double> values = RandomValues(random, size, 30.0);
      if (cols > 4) {
        std::fill_n(values.begin(), cols, -inf);                 // row 0
        values[static_cast<size_t>(cols + 2)] = std::nan("");    // row 1
        values[static_cast<size_t>(2 * cols + 1)] = -inf;        // row 2
        std::fill_n(values.begin() + 3 * cols, cols, 1000.0);    // row 3
        values[static_cast<size_t>(4 * cols + cols - 1)] = inf;  // row 4: in the tail
        std::fill_n(values.begin() + 5 * cols, cols, -1000.0);   // row 5
      }
      const Tensor logits(dtype, values);
      std::vector<int32_t> labels(static_cast<size_t>(rows));
      for (int64_t row = 0; row < rows; ++row) {  // the first and last column too, and no class
        const int64_t choice[] = {0, cols - 1, -1, cols, row % cols, row * 7919 % cols};
        labels[static_cast<size_t>(row)] = static_cast<int32_t>(choice[row % 6]);
      }
      Tensor lse(DType::kF32, rows), picked(DType::kF32, rows), total(DType::kF32, rows);
      const auto floats = [](Tensor& x) { return static_cast<float*>(x.data()); };
      (void)kernels.cross_entropy_forward({dtype, rows, cols, logits.data(), labels.data(),
                                           floats(lse), floats(picked), floats(total)},
                                          launch);
      const Tensor dlse(DType::kF32, RandomValues(random, rows)),
          dpicked(DType::kF32, RandomValues(random, rows)),
          dtotal(DType::kF32, RandomValues(random, rows));
      const auto of = [](const Tensor& x) { return static_cast<const float*>(x.data()); };
      Tensor dlogits(dtype, size);
      (void)kernels.cross_entropy_backward(
          {dtype, rows, cols, logits.data(), labels.data(), of(lse), of(dlse), of(dpicked),
           of(dtotal), dlogits.data()},
          launch);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t first = row * cols, label = labels[static_cast<size_t>(row)];
        double max = -inf, sum = 0, all = 0, magnitude = 0;
        for (int64_t i = first; i < first + cols; ++i) max = std::fmax(max, logits[i]);
        if (std::isinf(max)) max = 0;
        for (int64_t i = first; i < first + cols; ++i) {
          sum += std::exp(logits[i] - max);
          all += logits[i];
          magnitude += std::fabs(logits[i]);
        }
        const double want = max + std::log(sum);
        lse_error.Add(lse, row, want, std::fabs(want) + 1);
        total_error.Add(total, row, all, magnitude);
        const double hit = label >= 0 && label < cols ? logits[first + label] : 0;
        picked_is_exact &= picked[row] == hit || (std::isnan(hit) && std::isnan(picked[row]));
        for (int64_t i = first; i < first + cols; ++i) {
          const double p = std::exp(logits[i] - lse[row]) * dlse[row];
          const double one = i - first == label ? dpicked[row] : 0;
          // An error of lse is one of p; infinite, it makes p 0.
          const double relative = std::isinf(lse[row]) ? 1 : 1 + std::fabs(lse[row]);
          backward.Add(dlogits, i, p + dtotal[row] + one,
                       std::fabs(p) * relative + std::fabs(dtotal[row]) + std::fabs(one));
        }
      }
    }
    report.Add("cross entropy lse", kernels, dtype, lse_error.max(), 4.0);
    report.Add("cross entropy total", kernels, dtype, total_error.max(), 4.0);
    report.Add("cross entropy backward", kernels, dtype, backward.max(),
               dtype == DType::kF32 ? 4.0 : 0.6);
    report.Require(picked_is_exact, "the picked logit is exact");
  }
}

}  // namespace zenith::test
