// GroupNormForward and GroupNormBackward against cuda/group_norm_naive.cu. How to build and run:
// CMakeLists.txt.
//
// Tolerances, by element: the naive kernels compute in float64, the fast ones in float32, whose
// sums of n terms are off by about sqrt(n) roundoffs of the sum of the terms' magnitudes, and more
// operations follow; both results are then rounded to their type.
#include <algorithm>
#include <limits>

#include "cuda/naive.h"
#include "tests/cuda/harness.cuh"

namespace zenith::test {
namespace {

constexpr float kEps = 1e-5f;

double Sum(int64_t terms) { return (8 + std::sqrt(static_cast<double>(terms))) * kFloatRoundoff; }
/// Two roundings, at least to the smallest step.
double Rounding(DType dtype, double value) {
  return 2.01 * Roundoff(dtype) * std::fabs(value) + 2 * Smallest(dtype);
}

struct Problem {
  int64_t samples, rows, groups, channels;
  double shift = 1;    // the mean of x
  int64_t offset = 0;  // in elements, of every array

  GroupNormShape shape() const { return {true, samples, rows, groups, channels}; }
  int64_t size() const { return samples * rows * groups * channels; }
  int64_t width() const { return groups * channels; }
  std::string text() const {
    return std::to_string(samples) + "x" + std::to_string(rows) + "x" + std::to_string(groups) +
           "x" + std::to_string(channels) + (offset ? ", unaligned" : "");
  }
};

double Largest(const std::vector<float>& values) {
  double largest = 0;
  for (const float v : values)
    largest = std::isfinite(v) ? std::fmax(largest, std::fabs(v)) : largest;
  return largest;
}

void Test(Report& report, DType dtype, DType param_dtype, const Problem& p, bool silu) {
  report.Problem(dtype, p.text() + ", parameters " + Name(param_dtype) + (silu ? ", silu" : ""));
  Random random(7);
  const int64_t size = p.size(), statistics = p.samples * p.groups;
  std::vector<float> inputs = random.Normals(size, 2, 15, p.shift);
  const bool has_nan = p.samples > 2 && size > 0;
  if (has_nan) inputs[0] = NAN;  // the first group of the first sample
  if (p.samples > 1) std::fill(inputs.end() - size / p.samples, inputs.end(), 0.75f);  // all equal
  const Array x(dtype, inputs, p.offset), dy(dtype, random.Normals(size, 1, 10), p.offset);
  const Array scale(param_dtype, random.Normals(p.width(), 0.5, 1, 1), p.offset);
  const Array bias(param_dtype, random.Normals(p.width()), p.offset);
  Array y(dtype, size, p.offset), want(dtype, size);
  Array mean(DType::kF32, statistics), want_mean(DType::kF32, statistics);
  Array rstd(DType::kF32, statistics), want_rstd(DType::kF32, statistics);
  const GroupNormForwardArgs args{
      p.shape(),         dtype,        param_dtype, silu,     kEps,
      x.data(),          scale.data(), bias.data(), y.data(), mean.data<float>(),
      rstd.data<float>()};
  GroupNormForwardArgs oracle = args;
  oracle.y = want.data();
  oracle.mean = want_mean.data<float>();
  oracle.rstd = want_rstd.data<float>();
  RunOracle(report, "forward", {&want, &want_mean, &want_rstd},
            [&](Launch l) { return naive::GroupNormForward(oracle, l); });
  RunTwice(report, "forward", {&y, &mean, &rstd},
           [&](Launch l) { return GroupNormForward(args, l); });

  const std::vector<float> xs = x.Values(), dys = dy.Values(), ys = want.Values();
  const std::vector<float> means = want_mean.Values(), rstds = want_rstd.Values();
  const double s = Largest(scale.Values()), b = Largest(bias.Values());
  const int64_t terms = p.rows * p.channels;
  const auto statistic = [&](int64_t i) {
    return static_cast<size_t>(i / (p.rows * p.width()) * p.groups + i % p.width() / p.channels);
  };
  // Of each group: |x| relative to its deviation, which magnifies the mean's error; largest |xhat|.
  std::vector<double> amplification(static_cast<size_t>(statistics), 1), xhat(amplification);
  std::vector<double> g(static_cast<size_t>(statistics)), g_rms(g);
  for (int64_t i = 0; i < size; ++i) {
    const size_t at = statistic(i);
    const double value = xs[static_cast<size_t>(i)],
                 dz = 1.2 * std::fabs(dys[static_cast<size_t>(i)]);
    amplification[at] = std::fmax(amplification[at], (std::fabs(means[at]) + 1) * rstds[at]);
    xhat[at] = std::fmax(xhat[at], std::fabs(value - means[at]) * rstds[at]);
    g[at] = std::fmax(g[at], dz * s);
    g_rms[at] += dz * s * dz * s / static_cast<double>(terms);
  }
  const auto off = [&](size_t at) { return Sum(terms) * (amplification[at] + xhat[at]); };
  report.Compare("group norm forward", "y", y, want, [&](int64_t i) {
    return Rounding(dtype, ys[static_cast<size_t>(i)]) +
           1.2 * (off(statistic(i)) * s + Sum(1) * (b + s * xhat[statistic(i)]));
  });
  if (terms > 0) {
    report.Compare("group norm forward", "mean", mean, want_mean, [&](int64_t i) {
      const size_t at = static_cast<size_t>(i);
      return Sum(terms) * (std::fabs(means[at]) + 1 / rstds[at]);
    });
    report.Compare("group norm forward", "rstd", rstd, want_rstd, [&](int64_t i) {
      const size_t at = static_cast<size_t>(i);
      return 2 * Sum(terms) * amplification[at] * rstds[at];
    });
  }

  // Both kernels get the naive statistics.
  const int64_t partials = p.samples * p.width();
  Array dx(dtype, size, p.offset), want_dx(dtype, size);
  Array dscale(DType::kF32, partials), want_dscale(DType::kF32, partials);
  Array dbias(DType::kF32, partials), want_dbias(DType::kF32, partials);
  const GroupNormBackwardArgs backward{p.shape(),
                                       dtype,
                                       param_dtype,
                                       silu,
                                       x.data(),
                                       scale.data(),
                                       bias.data(),
                                       dy.data(),
                                       want_mean.data<float>(),
                                       want_rstd.data<float>(),
                                       dx.data(),
                                       dscale.data<float>(),
                                       dbias.data<float>()};
  GroupNormBackwardArgs backward_oracle = backward;
  backward_oracle.dx = want_dx.data();
  backward_oracle.dscale = want_dscale.data<float>();
  backward_oracle.dbias = want_dbias.data<float>();
  RunOracle(report, "backward", {&want_dx, &want_dscale, &want_dbias},
            [&](Launch l) { return naive::GroupNormBackward(backward_oracle, l); });
  RunTwice(report, "backward", {&dx, &dscale, &dbias},
           [&](Launch l) { return GroupNormBackward(backward, l); });
  const std::vector<float> dxs = want_dx.Values();
  std::vector<double> dbias_sizes(static_cast<size_t>(partials)), dscale_sizes(dbias_sizes);
  for (int64_t i = 0; i < size; ++i) {
    const size_t at = statistic(i);
    const size_t c = static_cast<size_t>(i / (p.rows * p.width()) * p.width() + i % p.width());
    const double dz = 1.2 * std::fabs(dys[static_cast<size_t>(i)]);
    dbias_sizes[c] += dz;
    dscale_sizes[c] += dz * std::fabs(xs[static_cast<size_t>(i)] - means[at]) * rstds[at];
  }
  // dz is off by what z is, in silu's second derivative, below 1/2; by no more than xhat is.
  const auto of_dz = [&](size_t at) {
    return silu ? Sum(8) * s * (amplification[at] + xhat[at]) : 0;
  };
  report.Compare("group norm backward", "dx", dx, want_dx, [&](int64_t i) {
    const size_t at = statistic(i);
    return Rounding(dtype, dxs[static_cast<size_t>(i)]) +
           rstds[at] * (Sum(terms) * (1 + xhat[at]) * (std::sqrt(g_rms[at]) * (1 + xhat[at])) +
                        Sum(8) * g[at] * (amplification[at] + xhat[at]) + of_dz(at) * g[at]);
  });
  const auto partial_tolerance = [&](const std::vector<double>& sizes, bool by_xhat) {
    return [&, by_xhat](int64_t i) {
      const size_t at = static_cast<size_t>(i / p.width() * p.groups + i % p.width() / p.channels);
      const size_t c = static_cast<size_t>(i);
      const double from_dz = (of_dz(at) + Sum(8)) * (by_xhat ? 1 + xhat[at] : 1) * dbias_sizes[c];
      return Sum(p.rows) * sizes[c] + from_dz +
             (by_xhat ? Sum(8) * amplification[at] * dbias_sizes[c] : 0) + 1e-30;
    };
  };
  report.Compare("group norm backward", "dscale", dscale, want_dscale,
                 partial_tolerance(dscale_sizes, true));
  report.Compare("group norm backward", "dbias", dbias, want_dbias,
                 partial_tolerance(dbias_sizes, false));
}

}  // namespace
}  // namespace zenith::test

int main(int argc, char** argv) {
  using namespace zenith::test;
  const bool small = IsSmall(argc, argv);
  Report report;
  // Groups that share a vector, straddle vectors, fill some; one group; groups of one channel;
  // last slabs that are narrower; rows that end in the middle of a step; clusters of 1 to 8.
  std::vector<Problem> problems = {
      {3, 100, 4, 4},  {2, 37, 3, 10}, {3, 700, 8, 10},     {2, 9, 1, 64},        {2, 1, 4, 8},
      {1, 333, 16, 1}, {3, 50, 2, 3},  {2, 65, 5, 7, 1, 1}, {2, 40, 4, 16, 1, 3},
  };
  if (!small) {
    const std::vector<Problem> large = {
        {4, 4096, 32, 10},      {2, 1024, 32, 20}, {2, 16384, 32, 4}, {1, 60000, 2, 16},
        {2, 2000, 1, 1024},     {3, 5000, 40, 1},  {2, 3000, 7, 24},  {1, 200, 12, 133},
        {2, 4096, 16, 16, 300}, {16, 64, 32, 8},   {1, 20011, 4, 5},  {2, 100000, 1, 8},
    };
    problems.insert(problems.end(), large.begin(), large.end());
  }
  problems.insert(problems.end(), {{0, 5, 2, 8}, {2, 0, 2, 8}});
  for (const Problem& problem : problems) {
    for (const zenith::DType dtype : kDTypes) {
      for (const bool silu : {false, true}) {
        const zenith::DType param = silu || problem.rows % 2 ? zenith::DType::kF32 : dtype;
        Test(report, dtype, param, problem, silu);
      }
    }
  }
  return report.Finish();
}
