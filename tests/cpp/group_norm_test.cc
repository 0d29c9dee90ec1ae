#include <array>
#include <cmath>

#include "tests/cpp/harness.h"

namespace zenith::test {
namespace {

struct Case {
  DType dtype, param_dtype;
  bool silu;
  GroupNormShape shape;

  int64_t size() const { return shape.samples * shape.sample_size(); }
  int64_t at(int64_t sample, int64_t row, int64_t channel) const {
    return sample * shape.sample_size() +
           (shape.channels_last ? row * shape.width() + channel : channel * shape.rows + row);
  }
};

double Sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

void TestCase(const CpuKernels& kernels, const Case& c, const Launch& launch, Report& report,
              Error& forward, Error& statistics, Error& backward, Error& parameters) {
  std::mt19937_64 random(5);
  const float eps = 1e-5f;
  const int64_t size = c.size(), width = c.shape.width(), groups = c.shape.groups;
  std::vector<double> values = RandomValues(random, size, 20.0);
  for (size_t i = 0; i < values.size(); ++i) values[i] += 2.0;
  if (size > 0 && c.shape.samples > 2) values[0] = std::nan("");
  const Tensor x(c.dtype, values), dy(c.dtype, RandomValues(random, size));
  const Tensor scale(c.param_dtype, RandomValues(random, width));
  const Tensor bias(c.param_dtype, RandomValues(random, width));
  const Launch alone = {nullptr, 1, nullptr};

  struct Results {
    Tensor y, mean, rstd, dx, dscale, dbias;
    bool Same(const Results& o) const {
      return y.SameBits(o.y) && mean.SameBits(o.mean) && rstd.SameBits(o.rstd) &&
             dx.SameBits(o.dx) && dscale.SameBits(o.dscale) && dbias.SameBits(o.dbias);
    }
  };
  const auto run = [&](const Launch& on) {
    Results r{Tensor(c.dtype, size),
              Tensor(DType::kF32, c.shape.samples * groups),
              Tensor(DType::kF32, c.shape.samples * groups),
              Tensor(c.dtype, size),
              Tensor(DType::kF32, c.shape.samples * width),
              Tensor(DType::kF32, c.shape.samples * width)};
    float *const mean = static_cast<float*>(r.mean.data()), *const rstd =
                                                                static_cast<float*>(r.rstd.data());
    const Status first =
        kernels.group_norm_forward({c.shape, c.dtype, c.param_dtype, c.silu, eps, x.data(),
                                    scale.data(), bias.data(), r.y.data(), mean, rstd},
                                   on);
    const Status second = kernels.group_norm_backward(
        {c.shape, c.dtype, c.param_dtype, c.silu, x.data(), scale.data(), bias.data(), dy.data(),
         mean, rstd, r.dx.data(), static_cast<float*>(r.dscale.data()),
         static_cast<float*>(r.dbias.data())},
        on);
    report.Require(first.ok() && second.ok(), "group norm returns ok");
    return r;
  };
  const Results got = run(launch);
  report.Require(got.Same(run(alone)), "group norm does not depend on threads");
  if (size == 0) return;

  const double count = static_cast<double>(c.shape.rows * c.shape.channels);
  for (int64_t sample = 0; sample < c.shape.samples; ++sample) {
    for (int64_t group = 0; group < groups; ++group) {
      const auto for_each = [&](auto body) {
        for (int64_t row = 0; row < c.shape.rows; ++row) {
          for (int64_t k = 0; k < c.shape.channels; ++k) {
            const int64_t channel = group * c.shape.channels + k;
            body(c.at(sample, row, channel), channel);
          }
        }
      };
      double mean = 0, variance = 0, size_x = 0;
      for_each([&](int64_t i, int64_t) { mean += x[i] / count; });
      for_each([&](int64_t i, int64_t) { size_x += std::fabs(x[i]) / count; });
      for_each([&](int64_t i, int64_t) { variance += std::pow(x[i] - mean, 2) / count; });
      const double rstd = 1 / std::sqrt(variance + eps);
      const double cancellation = 1 + size_x * rstd;
      statistics.Add(got.mean, sample * groups + group, mean, size_x);
      statistics.Add(got.rstd, sample * groups + group, rstd, cancellation * rstd);

      std::vector<double> dscale(static_cast<size_t>(width)), dbias(dscale);
      std::vector<double> dscale_size(dscale), dbias_size(dscale);
      double mean_g = 0, mean_gx = 0, size_g = 0, size_gx = 0, size_xhat = 0;
      const auto dz = [&](int64_t i, int64_t channel) {
        const double z = (x[i] - mean) * rstd * scale[channel] + bias[channel], s = Sigmoid(z);
        return dy[i] * (c.silu ? s + z * s * (1 - s) : 1.0);
      };
      for_each([&](int64_t i, int64_t channel) {
        const size_t at = static_cast<size_t>(channel);
        const double xhat = (x[i] - mean) * rstd, z = xhat * scale[channel] + bias[channel];
        const double size_z =
            (std::fabs(xhat) + cancellation) * std::fabs(scale[channel]) + std::fabs(bias[channel]);
        forward.Add(got.y, i, c.silu ? z * Sigmoid(z) : z, size_z);
        dscale[at] += dz(i, channel) * xhat;
        dbias[at] += dz(i, channel);
        // dz is off by what z is; where there is a NaN, dbias without silu is none.
        const double size_dz = std::fabs(dy[i]) * (c.silu ? 1 + size_z : 1.0);
        dscale_size[at] += size_dz * (std::fabs(xhat) + cancellation);
        dbias_size[at] += size_dz;
        const double g = dz(i, channel) * scale[channel];
        mean_g += g / count;
        mean_gx += g * xhat / count;
        size_g += std::fabs(g) / count;
        size_gx += std::fabs(g * xhat) / count;
        size_xhat = std::fmax(size_xhat, std::fabs(xhat));
      });
      for (int64_t k = 0; k < c.shape.channels; ++k) {
        const int64_t channel = group * c.shape.channels + k, at = sample * width + channel;
        const size_t p = static_cast<size_t>(channel);
        parameters.Add(got.dscale, at, dscale[p], dscale_size[p]);
        parameters.Add(got.dbias, at, dbias[p], dbias_size[p]);
      }
      for_each([&](int64_t i, int64_t channel) {
        const double xhat = (x[i] - mean) * rstd, g = dz(i, channel) * scale[channel];
        const double size_dz =
            std::fabs(dy[i] * scale[channel]) * (1 + cancellation * std::fabs(scale[channel]));
        backward.Add(
            got.dx, i, rstd * (g - mean_g - xhat * mean_gx),
            rstd * (size_dz + size_g + (size_xhat + cancellation) * size_gx * cancellation));
      });
    }
  }
}

}  // namespace

void TestGroupNorm(const CpuKernels& kernels, Report& report) {
  Pool pool(4);
  const Launch launch = pool.launch();
  for (const DType dtype : kDTypes) {
    Error forward, statistics, backward, parameters;
    for (const bool channels_last : {false, true}) {
      for (const bool silu : {false, true}) {
        const DType param_dtype = silu ? DType::kF32 : dtype;
        for (const auto& [samples, rows, groups, channels] : {std::array<int64_t, 4>{1, 1, 1, 1},
                                                              {3, 37, 2, 5},
                                                              {2, 100, 4, 16},
                                                              {2, 9, 8, 1},
                                                              {1, 700, 3, 10},
                                                              {40, 16, 2, 8},
                                                              {1, 3, 1, 400},
                                                              {0, 4, 2, 2},
                                                              {2, 0, 2, 2},
                                                              {2, 4, 2, 0}}) {
          TestCase(kernels,
                   {dtype, param_dtype, silu, {channels_last, samples, rows, groups, channels}},
                   launch, report, forward, statistics, backward, parameters);
        }
      }
    }
    const double limit = dtype == DType::kF32 ? 4.0 : 0.6;
    report.Add("group_norm forward", kernels, dtype, forward.max(), limit);
    report.Add("group_norm mean, rstd", kernels, DType::kF32, statistics.max(), 4.0);
    report.Add("group_norm dx", kernels, dtype, backward.max(), limit);
    report.Add("group_norm dscale, dbias", kernels, DType::kF32, parameters.max(), 4.0);
  }
}

}  // namespace zenith::test
