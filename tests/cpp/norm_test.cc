#include <array>
#include <cmath>

#include "tests/cpp/harness.h"

namespace zenith::test {
namespace {

struct Case {
  NormKind kind;
  DType dtype, param_dtype;
  bool residual;
  int64_t batch, batch_rows, groups, cols;
};

struct Statistics {
  double mean = 0, scale = 0;
  double cancellation = 0;  // (|mean| + deviation) / deviation: how much x - mean magnifies
};
Statistics RowStatistics(const Case& c, double eps, const Tensor& x, int64_t row) {
  Statistics result;
  const double count = static_cast<double>(c.cols);
  if (c.kind == NormKind::kLayer) {
    for (int64_t i = 0; i < c.cols; ++i) result.mean += x[row * c.cols + i] / count;
  }
  double variance = 0;
  for (int64_t i = 0; i < c.cols; ++i) {
    variance += std::pow(x[row * c.cols + i] - result.mean, 2) / count;
  }
  result.scale = 1 / std::sqrt(variance + eps);
  result.cancellation = 1 + std::fabs(result.mean) * result.scale;
  return result;
}

void TestCase(const CpuKernels& kernels, const Case& c, const Launch& launch, Report& report,
              Error& forward, Error& backward, Error& parameters) {
  std::mt19937_64 random(3);
  const int64_t rows = c.batch * c.batch_rows, size = rows * c.cols;
  const float eps = 1e-5f;
  std::vector<double> values = RandomValues(random, size, 50.0);
  for (size_t i = 0; i < values.size(); ++i) values[i] += i % 3 == 0 ? 0.0 : 4.0;
  if (size > 5 && rows > 2) values[3] = std::nan("");
  const Tensor x(c.dtype, values), residual(c.dtype, RandomValues(random, size));
  const Tensor scale(c.param_dtype, RandomValues(random, c.cols));
  const Tensor bias(c.param_dtype, RandomValues(random, c.cols));
  const Tensor dy(c.dtype, RandomValues(random, size)), dsum(c.dtype, RandomValues(random, size));
  const bool layer = c.kind == NormKind::kLayer;

  Tensor y(c.dtype, size), sum(c.dtype, size);
  const Status status = kernels.norm_forward(
      {c.kind, c.dtype, c.param_dtype, rows, c.cols, eps, x.data(),
       c.residual ? residual.data() : nullptr, scale.data(), layer ? bias.data() : nullptr,
       y.data(), c.residual ? sum.data() : nullptr},
      launch);
  report.Require(status.ok(), "norm forward returns ok");
  if (c.residual) {
    Error sum_error;
    for (int64_t i = 0; i < size; ++i)
      sum_error.Add(sum, i, x[i] + residual[i], x[i] + residual[i]);
    report.Require(sum_error.max() <= 0.51, "norm: sum is the rounded x + residual");
  }
  const Tensor& input = c.residual ? sum : x;

  const int64_t groups = c.batch * c.groups, params = groups * c.cols;
  Tensor dx(c.dtype, size), dscale(DType::kF32, params), dbias(DType::kF32, params);
  const auto run_backward = [&](const Launch& on, Tensor& dx_out, Tensor& dscale_out,
                                Tensor& dbias_out) {
    const Status backward_status = kernels.norm_backward(
        {c.kind, c.dtype, c.param_dtype, c.batch, c.batch_rows, c.groups, c.cols, eps, input.data(),
         scale.data(), dy.data(), c.residual ? dsum.data() : nullptr, dx_out.data(),
         static_cast<float*>(dscale_out.data()),
         layer ? static_cast<float*>(dbias_out.data()) : nullptr},
        on);
    report.Require(backward_status.ok(), "norm backward returns ok");
  };
  run_backward(launch, dx, dscale, dbias);
  Tensor dx2(c.dtype, size), dscale2(DType::kF32, params), dbias2(DType::kF32, params);
  run_backward({nullptr, 1, nullptr}, dx2, dscale2, dbias2);
  report.Require(dx.SameBits(dx2) && dscale.SameBits(dscale2) && dbias.SameBits(dbias2),
                 "norm backward does not depend on threads");

  std::vector<double> want_dscale(static_cast<size_t>(params)), want_dbias(want_dscale);
  std::vector<double> dscale_size(want_dscale), dbias_size(want_dscale);
  const double count = static_cast<double>(c.cols);
  // Group g has the rows from batch_rows * g / groups on.
  const auto group_of = [&](int64_t row) {
    int64_t group = 0;
    while (row % c.batch_rows >= c.batch_rows * (group + 1) / c.groups) ++group;
    return row / c.batch_rows * c.groups + group;
  };
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t group = group_of(row);
    const Statistics s = RowStatistics(c, eps, input, row);
    double mean_g = 0, mean_gx = 0, size_g = 0, size_gx = 0;
    for (int64_t i = 0; i < c.cols; ++i) {
      const double g = dy[row * c.cols + i] * scale[i];
      const double gx = g * (input[row * c.cols + i] - s.mean) * s.scale;
      mean_g += layer ? g / count : 0;
      mean_gx += gx / count;
      size_g += std::fabs(g) / count;
      size_gx += std::fabs(gx) / count;
    }
    for (int64_t i = 0; i < c.cols; ++i) {
      const int64_t at = row * c.cols + i;
      const double xhat = (input[at] - s.mean) * s.scale;
      const double want = xhat * scale[i] + (layer ? bias[i] : 0);
      const double size_xhat = std::fabs(xhat) + s.cancellation;
      forward.Add(y, at, want, size_xhat * std::fabs(scale[i]) + (layer ? std::fabs(bias[i]) : 0));
      const double g = dy[at] * scale[i];
      const double add = c.residual ? dsum[at] : 0;
      backward.Add(dx, at, s.scale * (g - mean_g - xhat * mean_gx) + add,
                   s.scale * (std::fabs(g) + size_g + size_xhat * size_gx * s.cancellation) +
                       std::fabs(add));
      const size_t p = static_cast<size_t>(group * c.cols + i);
      want_dscale[p] += dy[at] * xhat;
      want_dbias[p] += dy[at];
      dscale_size[p] += std::fabs(dy[at]) * size_xhat;
      dbias_size[p] += std::fabs(dy[at]);
    }
  }
  for (int64_t i = 0; i < params; ++i) {
    const size_t p = static_cast<size_t>(i);
    parameters.Add(dscale, i, want_dscale[p], dscale_size[p]);
    if (layer) parameters.Add(dbias, i, want_dbias[p], dbias_size[p]);
  }
}

}  // namespace

void TestNorm(const CpuKernels& kernels, Report& report) {
  Pool pool(4);
  const Launch launch = pool.launch();
  for (const NormKind kind : {NormKind::kLayer, NormKind::kRms}) {
    for (const DType dtype : kDTypes) {
      Error forward, backward, parameters;
      for (const DType param_dtype : {dtype, DType::kF32}) {
        for (const bool residual : {false, true}) {
          for (const int64_t cols : {0, 1, 5, 16, 17, 31, 64, 100, 768}) {
            for (const auto& [batch, rows, groups] : {std::array<int64_t, 3>{1, 1, 1},
                                                      {1, 0, 2},
                                                      {0, 3, 1},
                                                      {3, 5, 1},
                                                      {2, 7, 3},
                                                      {1, 2, 3},
                                                      {1, 300, 1},
                                                      {1, 301, 4}}) {
              TestCase(kernels, {kind, dtype, param_dtype, residual, batch, rows, groups, cols},
                       launch, report, forward, backward, parameters);
            }
          }
        }
      }
      const std::string name = kind == NormKind::kLayer ? "layer_norm" : "rms_norm";
      const double limit = dtype == DType::kF32 ? 4.0 : 0.6;
      report.Add(name + " forward", kernels, dtype, forward.max(), limit);
      report.Add(name + " dx", kernels, dtype, backward.max(), limit);
      report.Add(name + " dscale, dbias", kernels, DType::kF32, parameters.max(), 4.0);
    }
  }
}

void TimeNorm(const CpuKernels& kernels, const Launch& launch, Report& report) {
  std::mt19937_64 random(3);
  const int64_t rows = 4096, cols = 1024, size = rows * cols;
  for (const DType dtype : kDTypes) {
    const Tensor x(dtype, RandomValues(random, size)), dy(dtype, RandomValues(random, size));
    const Tensor scale(dtype, RandomValues(random, cols)), bias(scale);
    Tensor y(dtype, size), dscale(DType::kF32, cols), dbias(DType::kF32, cols);
    const double gb = static_cast<double>(size) * (dtype == DType::kF32 ? 4 : 2) * 1e-6;
    const double forward = BestTime([&] {
      (void)kernels.norm_forward({NormKind::kLayer, dtype, dtype, rows, cols, 1e-5f, x.data(),
                                  nullptr, scale.data(), bias.data(), y.data(), nullptr},
                                 launch);
    });
    report.Time("layer_norm 4096x1024", kernels, dtype, forward, 2 * gb / forward, "GB/s");
    const double backward = BestTime([&] {
      (void)kernels.norm_backward(
          {NormKind::kLayer, dtype, dtype, 1, rows, 1, cols, 1e-5f, x.data(), scale.data(),
           dy.data(), nullptr, y.data(), static_cast<float*>(dscale.data()),
           static_cast<float*>(dbias.data())},
          launch);
    });
    report.Time("layer_norm backward 4096x1024", kernels, dtype, backward, 3 * gb / backward,
                "GB/s");
  }
}

}  // namespace zenith::test
