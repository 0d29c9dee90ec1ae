// The convolution against a sum over pixels, elements of the filter and channels in float64.
#include <algorithm>
#include <cmath>

#include "tests/cpp/harness.h"

namespace zenith::test {
namespace {

struct Case {
  int64_t images, channels, features;
  ConvAxis height, width;
  bool relu, scale, residual;
};

const float* Floats(const Tensor& tensor) { return static_cast<const float*>(tensor.data()); }

struct Sum {
  double value, magnitude;
};

Sum SumOf(const Case& c, const Tensor& x, const Tensor& filter, int64_t image, int64_t p, int64_t q,
          int64_t o) {
  const ConvAxis &h = c.height, &w = c.width;
  double sum = 0, magnitude = 1;
  for (int64_t i = 0; i < h.kernel; ++i) {
    for (int64_t j = 0; j < w.kernel; ++j) {
      const int64_t row = p * h.stride - h.before + i * h.dilation;
      const int64_t column = q * w.stride - w.before + j * w.dilation;
      if (row < 0 || row >= h.size || column < 0 || column >= w.size) continue;
      for (int64_t k = 0; k < c.channels; ++k) {
        const double term = x[((image * h.size + row) * w.size + column) * c.channels + k] *
                            filter[((i * w.kernel + j) * c.channels + k) * c.features + o];
        sum += term;
        magnitude += std::fabs(term);
      }
    }
  }
  return {sum, magnitude};
}

double TestCase(const CpuKernels& kernels, const Case& c, const Launch& launch, Report& report) {
  const ConvAxis &h = c.height, &w = c.width;
  std::mt19937_64 random(7);
  const int64_t rows = h.out / h.pool, columns = w.out / w.pool;
  const int64_t size = c.images * rows * columns * c.features;
  std::vector<double> values = RandomValues(random, c.images * h.size * w.size * c.channels);
  if (values.size() > 40) values[17] = std::nan("");
  const Tensor x(DType::kF32, values);
  const Tensor filter(DType::kF32,
                      RandomValues(random, h.kernel * w.kernel * c.channels * c.features));
  const Tensor scale(DType::kF32, RandomValues(random, c.features));
  const Tensor bias(DType::kF32, RandomValues(random, c.features));
  const Tensor residual(DType::kF32, RandomValues(random, size));
  const auto run = [&](const Launch& on, Tensor& y) {
    const Status status = kernels.conv_forward(
        {c.relu, c.images, c.channels, c.features, h, w, Floats(x), Floats(filter),
         c.scale ? Floats(scale) : nullptr, Floats(bias), c.residual ? Floats(residual) : nullptr,
         static_cast<float*>(y.data())},
        on);
    report.Require(status.ok(), "conv returns ok");
  };
  Tensor y(DType::kF32, size), alone(DType::kF32, size);
  run(launch, y);
  run({nullptr, 1, nullptr}, alone);
  report.Require(y.SameBits(alone), "conv does not depend on threads");

  Error error;
  for (int64_t at = 0; at < size; ++at) {
    const int64_t o = at % c.features, pixel = at / c.features;
    const int64_t q = pixel % columns, p = pixel / columns % rows, image = pixel / columns / rows;
    double wanted = -INFINITY, magnitude = 1;
    for (int64_t i = 0; i < h.pool * w.pool; ++i) {
      const int64_t row = p * h.pool + i / w.pool, column = q * w.pool + i % w.pool;
      const Sum sum = SumOf(c, x, filter, image, row, column, o);
      const double factor = c.scale ? scale[o] : 1, more = c.residual ? residual[at] : 0;
      const double value = sum.value * factor + bias[o] + more;
      wanted = std::isnan(wanted) || value < wanted ? wanted : value;
      if (std::isnan(value)) continue;
      magnitude = std::max(
          magnitude, sum.magnitude * std::fabs(factor) + std::fabs(bias[o]) + std::fabs(more));
    }
    error.Add(y, at, c.relu && wanted < 0 ? 0 : wanted, magnitude);
  }
  return error.max();
}

ConvAxis Axis(int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int64_t before,
              int64_t after) {
  const int64_t reach = (kernel - 1) * dilation + 1;
  return {size,     std::max<int64_t>(0, (size + before + after - reach) / stride + 1),
          kernel,   stride,
          dilation, before};
}

}  // namespace

void TestConv(const CpuKernels& kernels, Report& report) {
  Pool pool(3);
  const Launch launch = pool.launch();
  const ConvAxis axes[] = {
      Axis(9, 3, 1, 1, 1, 1),                            // as most are
      Axis(11, 7, 2, 1, 3, 3),                           // passes the edges by more than a pixel
      Axis(6, 1, 2, 1, 0, 0),   Axis(8, 3, 1, 3, 3, 2),  // dilated
      Axis(9, 2, 1, 1, -2, -1),                          // cropped
      Axis(1, 3, 1, 1, 4, 4),                            // results that see no pixel
      Axis(4, 4, 1, 1, 0, 0),                            // one result
      Axis(2, 3, 1, 1, 0, 0),                            // none
  };
  double worst = 0;
  int number = 0;
  for (const ConvAxis& height : axes) {
    for (const ConvAxis& width : axes) {
      // Whole and partial vectors, panels and chunks.
      const std::pair<int64_t, int64_t> sizes[] = {{1, 32}, {3, 64}, {5, 7}, {130, 17}, {64, 150}};
      const auto& [channels, features] = sizes[number % 5];
      const Case c{1 + number % 3, channels,        features,        height,
                   width,          number % 2 == 0, number % 3 == 0, number % 7 < 4};
      worst = std::max(worst, TestCase(kernels, c, launch, report));
      // Of two pixels, of all of a column, and of 2 x 2, some of them next to ones in no window.
      const auto pooled = [&](ConvAxis axis, int64_t pool) {
        axis.pool = std::max<int64_t>(1, std::min(axis.out, pool));
        axis.out -= axis.out % axis.pool;
        return axis;
      };
      const std::pair<int64_t, int64_t> pools[] = {{1, 2}, {9, 1}, {2, 2}, {2, 2}};
      const auto& [down, across] = pools[number % 4];
      worst = std::max(worst, TestCase(kernels,
                                       {c.images, channels, features, pooled(height, down),
                                        pooled(width, across), c.relu, c.scale, false},
                                       launch, report));
      ++number;
    }
  }
  // Sums of up to 6370 terms, one after the other; 3 times what was seen.
  report.Add("conv", kernels, DType::kF32, worst, 4);
  const Case none{0, 3, 5, axes[0], axes[0], false, false, false};
  TestCase(kernels, none, launch, report);
}

}  // namespace zenith::test
