// NormForward, NormBackward, SoftmaxForward and SoftmaxBackward against cuda/norm_naive.cu and
// cuda/softmax_naive.cu; CrossEntropyForward and CrossEntropyBackward against
// cuda/cross_entropy_naive.cu. How to build and run: CMakeLists.txt.
//
// Tolerances, by element. Fast and naive result are each rounded to their type once: two roundoffs
// of the result. Before that the naive kernels compute in float64 and the fast ones in float32:
// sums of n terms are then off by about sqrt(n) roundoffs of float32 relative to the sum of the
// terms' magnitudes, if rounding errors are random, and a few operations follow:
//   Sum(n) = (8 + sqrt(n)) * 2^-24
#include <algorithm>
#include <cstring>
#include <limits>

#include "cuda/naive.h"
#include "tests/cuda/harness.cuh"

namespace zenith::test {
namespace {

constexpr float kEps = 1e-5f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

double Sum(int64_t terms) { return (8 + std::sqrt(static_cast<double>(terms))) * kFloatRoundoff; }
/// Two roundings, at least to the smallest step.
double Rounding(DType dtype, double value) {
  return 2.01 * Roundoff(dtype) * std::fabs(value) + 2 * Smallest(dtype);
}

struct Shape {
  int64_t batch, rows, cols;  // the forward and softmax see batch * rows
  int64_t offset = 0;         // in elements, of every array
  int64_t groups = 1;         // of rows

  int64_t all_rows() const { return batch * rows; }
  int64_t size() const { return all_rows() * cols; }
  std::string text() const {
    return std::to_string(batch) + "x" + std::to_string(rows) + "x" + std::to_string(cols) +
           (groups > 1 ? ", " + std::to_string(groups) + " groups" : "") +
           (offset ? ", unaligned" : "");
  }
};

/// What the tolerances need to know of a row that is normalised.
struct RowSizes {
  double mean = 0, rstd = 0;
  double amplification = 0;  // of errors of x's sums: rms(x) * rstd, large where the mean is
  double xhat = 0;           // largest |xhat|
  double g_rms = 0, g = 0;   // of g = dy * scale; largest |g|

  RowSizes(NormKind kind, const float* x, const float* dy, const std::vector<float>& scale) {
    const double n = static_cast<double>(scale.size());
    double squares = 0, variance = 0;
    for (size_t c = 0; c < scale.size(); ++c) {
      if (kind == NormKind::kLayer) mean += x[c] / n;
      squares += double{x[c]} * x[c] / n;
    }
    for (size_t c = 0; c < scale.size(); ++c) {
      variance += (x[c] - mean) * (x[c] - mean) / n;
      if (dy == nullptr) continue;
      const double term = double{dy[c]} * scale[c];
      g_rms += term * term / n;
      g = std::fmax(g, std::fabs(term));
    }
    g_rms = std::sqrt(g_rms);
    rstd = 1 / std::sqrt(variance + kEps);
    amplification = std::fmax(1, std::sqrt(squares) * rstd);
    for (size_t c = 0; c < scale.size(); ++c) xhat = std::fmax(xhat, std::fabs(x[c] - mean) * rstd);
  }
};

double LargestMagnitude(const std::vector<float>& values) {
  double largest = 0;
  for (const float value : values) largest = std::fmax(largest, std::fabs(value));
  return largest;
}

/// A mean of half a deviation, or of `shift`; the last row all equal, where rstd is 316.
std::vector<float> NormInputs(Random& random, const Shape& shape, double shift) {
  std::vector<float> x = random.Normals(shape.size(), 2, 15, shift);
  if (shape.all_rows() > 2) std::fill(x.end() - shape.cols, x.end(), 0.75f);
  return x;
}

void TestNormForward(Report& report, NormKind kind, DType dtype, DType param_dtype,
                     const Shape& shape, bool residual, double shift = 1) {
  report.Problem(dtype, std::string(kind == NormKind::kLayer ? "layer " : "rms ") + shape.text() +
                            ", parameters " + Name(param_dtype) + (residual ? ", residual" : ""));
  Random random(2);
  const bool layer = kind == NormKind::kLayer;
  const int64_t size = shape.size(), cols = shape.cols;
  std::vector<float> inputs = NormInputs(random, shape, shift);
  if (shape.all_rows() > 3 && cols > 0) inputs[static_cast<size_t>(2 * cols - 1)] = NAN;
  const Array x(dtype, inputs, shape.offset);
  const Array scale(param_dtype, random.Normals(cols, 0.5, 1, 1), shape.offset);
  Array r, bias, sum, want_sum;
  if (layer) bias = Array(param_dtype, random.Normals(cols), shape.offset);
  if (residual) {
    r = Array(dtype, random.Normals(size), shape.offset);
    sum = Array(dtype, size, shape.offset);
    want_sum = Array(dtype, size, shape.offset);
  }
  Array y(dtype, size, shape.offset), want(dtype, size, shape.offset);

  const NormForwardArgs args{kind,         dtype,       param_dtype, shape.all_rows(),
                             cols,         kEps,        x.data(),    r.data(),
                             scale.data(), bias.data(), y.data(),    sum.data()};
  NormForwardArgs oracle = args;
  oracle.y = want.data();
  oracle.sum = want_sum.data();
  RunOracle(report, "forward", {&want, &want_sum},
            [&](Launch l) { return naive::NormForward(oracle, l); });
  RunTwice(report, "forward", {&y, &sum}, [&](Launch l) { return NormForward(args, l); });

  const std::vector<float> xs = (residual ? want_sum : x).Values(), ys = want.Values();
  const std::vector<float> scales = scale.Values();
  const double largest_scale = LargestMagnitude(scales),
               largest_bias = LargestMagnitude(bias.Values());
  std::vector<double> tolerances;
  for (int64_t row = 0; row < shape.all_rows() && cols > 0; ++row) {
    const RowSizes s(kind, xs.data() + row * cols, nullptr, scales);
    // xhat is off by the mean's error, and relatively by the deviation's.
    tolerances.push_back(Sum(cols) * (largest_scale * (s.amplification + s.xhat) + largest_bias));
  }
  report.Compare("norm forward", "y", y, want, [&](int64_t i) {
    return Rounding(dtype, ys[static_cast<size_t>(i)]) + tolerances[static_cast<size_t>(i / cols)];
  });
  if (residual) {  // one addition, rounded: the same bits
    report.Compare("norm forward", "sum", sum, want_sum, [&](int64_t) { return 1e-300; });
  }
}

void TestNormBackward(Report& report, NormKind kind, DType dtype, DType param_dtype,
                      const Shape& shape, bool with_dsum) {
  report.Problem(dtype, std::string(kind == NormKind::kLayer ? "layer " : "rms ") + shape.text() +
                            ", parameters " + Name(param_dtype) + (with_dsum ? ", dsum" : ""));
  Random random(3);
  const bool layer = kind == NormKind::kLayer;
  const int64_t size = shape.size(), cols = shape.cols;
  const Array x(dtype, NormInputs(random, shape, 1), shape.offset);
  const Array scale(param_dtype, random.Normals(cols, 0.5, 1, 1), shape.offset);
  const Array dy(dtype, random.Normals(size, 1, 10), shape.offset);
  Array dsum;
  if (with_dsum) dsum = Array(dtype, random.Normals(size), shape.offset);
  const int64_t partials = shape.batch * shape.groups * cols;
  Array dx(dtype, size, shape.offset), want_dx(dtype, size, shape.offset);
  Array dscale(DType::kF32, partials, shape.offset), want_dscale(DType::kF32, partials);
  Array dbias, want_dbias;
  if (layer) {
    dbias = Array(DType::kF32, partials, shape.offset);
    want_dbias = Array(DType::kF32, partials);
  }

  const NormBackwardArgs args{kind,
                              dtype,
                              param_dtype,
                              shape.batch,
                              shape.rows,
                              shape.groups,
                              cols,
                              kEps,
                              x.data(),
                              scale.data(),
                              dy.data(),
                              dsum.data(),
                              dx.data(),
                              dscale.data<float>(),
                              dbias.data<float>()};
  NormBackwardArgs oracle = args;
  oracle.dx = want_dx.data();
  oracle.dscale = want_dscale.data<float>();
  oracle.dbias = want_dbias.data<float>();
  RunOracle(report, "backward", {&want_dx, &want_dscale, &want_dbias},
            [&](Launch l) { return naive::NormBackward(oracle, l); });
  RunTwice(report, "backward", {&dx, &dscale, &dbias},
           [&](Launch l) { return NormBackward(args, l); });

  const std::vector<float> xs = x.Values(), dys = dy.Values(), scales = scale.Values();
  const std::vector<float> dxs = want_dx.Values();
  const double largest_scale = LargestMagnitude(scales);
  std::vector<double> dx_tolerances;
  std::vector<double> dscale_tolerances(static_cast<size_t>(partials));
  std::vector<double> dbias_tolerances(static_cast<size_t>(partials));
  for (int64_t row = 0, group = 0; row < shape.all_rows() && cols > 0; ++row) {
    while (row >= RowsOfGroup(args, group).end) ++group;
    const float* row_x = xs.data() + row * cols;
    const float* row_dy = dys.data() + row * cols;
    const RowSizes s(kind, row_x, row_dy, scales);
    // g and rstd are rounded; mean(g) and mean(g * xhat) are sums, xhat is off as in the forward.
    dx_tolerances.push_back(Sum(cols) * s.rstd * (s.g + s.amplification * (1 + s.xhat) * s.g_rms));
    // dscale sums dy * xhat over the rows, in both kernels in float32; dbias sums dy.
    for (int64_t c = 0; c < cols; ++c) {
      const size_t i = static_cast<size_t>(group * cols + c);
      const double magnitude = std::fabs(row_dy[c]);
      dscale_tolerances[i] += (Sum(cols) * (s.amplification + s.xhat) +
                               2 * Sum(shape.rows) * std::fabs(row_x[c] - s.mean) * s.rstd) *
                              magnitude;
      dbias_tolerances[i] += 2 * Sum(shape.rows) * magnitude;
    }
  }
  report.Compare("norm backward", "dx", dx, want_dx, [&](int64_t i) {
    return Rounding(dtype, dxs[static_cast<size_t>(i)]) +
           dx_tolerances[static_cast<size_t>(i / cols)];
  });
  const auto at = [](const std::vector<double>& tolerances) {
    return [&tolerances](int64_t i) { return tolerances[static_cast<size_t>(i)] + 1e-30; };
  };
  report.Compare("norm backward", "dscale", dscale, want_dscale, at(dscale_tolerances));
  if (layer) report.Compare("norm backward", "dbias", dbias, want_dbias, at(dbias_tolerances));
}

/// Row 0 is partly -inf; of six rows, one is all -inf, one has a NaN, one +inf, one large equals.
std::vector<float> SoftmaxInputs(Random& random, const Shape& shape) {
  std::vector<float> x = random.Normals(shape.size(), 3, 10);
  const int64_t cols = shape.cols;
  if (cols > 2 && shape.all_rows() > 0) std::fill_n(x.begin(), cols / 2, -kInfinity);
  if (cols > 0 && shape.all_rows() > 5) {
    std::fill_n(x.begin() + cols, cols, -kInfinity);
    x[static_cast<size_t>(3 * cols - 1)] = NAN;
    x[static_cast<size_t>(3 * cols)] = kInfinity;
    std::fill_n(x.begin() + 4 * cols, cols, 3e4f);
  }
  return x;
}

void TestSoftmax(Report& report, DType dtype, const Shape& shape) {
  report.Problem(dtype, shape.text());
  Random random(4);
  const int64_t size = shape.size(), cols = shape.cols;
  const Array x(dtype, SoftmaxInputs(random, shape), shape.offset);
  Array y(dtype, size, shape.offset), want(dtype, size, shape.offset);

  const SoftmaxForwardArgs args{dtype, shape.all_rows(), cols, x.data(), y.data()};
  SoftmaxForwardArgs oracle = args;
  oracle.y = want.data();
  RunOracle(report, "softmax", {&want}, [&](Launch l) { return naive::SoftmaxForward(oracle, l); });
  RunTwice(report, "softmax", {&y}, [&](Launch l) { return SoftmaxForward(args, l); });
  // exp(x - max) is off by up to |x - max| <= |ln y| roundoffs, with __expf by twice that.
  const std::vector<float> ys = want.Values();
  report.Compare("softmax forward", "y", y, want, [&](int64_t i) {
    const double value = ys[static_cast<size_t>(i)];
    const double exponent = value > 0 ? -std::log(value) : 0;
    return Rounding(dtype, value) + (Sum(cols) + 4 * exponent * kFloatRoundoff) * value;
  });

  // Both kernels get the naive y, its NaN rows included.
  const Array dy(dtype, random.Normals(size, 1, 30), shape.offset);
  Array dx(dtype, size, shape.offset), want_dx(dtype, size, shape.offset);
  const SoftmaxBackwardArgs backward{dtype,       shape.all_rows(), cols,
                                     want.data(), dy.data(),        dx.data()};
  SoftmaxBackwardArgs backward_oracle = backward;
  backward_oracle.dx = want_dx.data();
  RunOracle(report, "softmax backward", {&want_dx},
            [&](Launch l) { return naive::SoftmaxBackward(backward_oracle, l); });
  RunTwice(report, "softmax backward", {&dx},
           [&](Launch l) { return SoftmaxBackward(backward, l); });
  const std::vector<float> dys = dy.Values(), dxs = want_dx.Values();
  std::vector<double> terms;  // sum of |y * dy| of a row
  for (int64_t i = 0; i < size; ++i) {
    if (i % cols == 0) terms.push_back(0);
    terms.back() += std::fabs(double{ys[static_cast<size_t>(i)]} * dys[static_cast<size_t>(i)]);
  }
  report.Compare("softmax backward", "dx", dx, want_dx, [&](int64_t i) {
    const size_t at = static_cast<size_t>(i);
    return Rounding(dtype, dxs[at]) +
           Sum(cols) * ys[at] * (std::fabs(dys[at]) + terms[static_cast<size_t>(i / cols)]);
  });
}

void TestCrossEntropy(Report& report, DType dtype, const Shape& shape) {
  report.Problem(dtype, shape.text());
  Random random(5);
  const int64_t rows = shape.all_rows(), cols = shape.cols, size = shape.size();
  std::vector<float> inputs = random.Normals(size, 1, 30);
  if (rows > 4 && cols > 1) {
    std::fill_n(inputs.begin(), cols, -kInfinity);                 // row 0
    inputs[static_cast<size_t>(2 * cols - 1)] = NAN;               // row 1
    inputs[static_cast<size_t>(2 * cols)] = kInfinity;             // row 2
    std::fill_n(inputs.begin() + 3 * cols, cols, -1000.0f);        // row 3
    std::fill_n(inputs.begin() + 4 * cols, cols / 2, -kInfinity);  // row 4
  }
  std::vector<float> bits(static_cast<size_t>(rows));  // int32, in an array of as many bytes
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t choice[] = {0, cols - 1, -1, cols, row * 7919 % cols};
    const auto label = static_cast<int32_t>(choice[row % 5]);
    std::memcpy(&bits[static_cast<size_t>(row)], &label, sizeof(label));
  }
  const Array logits(dtype, inputs, shape.offset), labels(DType::kF32, bits);
  Array lse(DType::kF32, rows), picked(DType::kF32, rows), total(DType::kF32, rows);
  Array want_lse(DType::kF32, rows), want_picked(DType::kF32, rows), want_total(DType::kF32, rows);
  const CrossEntropyForwardArgs args{dtype,
                                     rows,
                                     cols,
                                     logits.data(),
                                     labels.data<const int32_t>(),
                                     lse.data<float>(),
                                     picked.data<float>(),
                                     total.data<float>()};
  CrossEntropyForwardArgs oracle = args;
  oracle.lse = want_lse.data<float>();
  oracle.picked = want_picked.data<float>();
  oracle.total = want_total.data<float>();
  RunOracle(report, "cross entropy", {&want_lse, &want_picked, &want_total},
            [&](Launch l) { return naive::CrossEntropyForward(oracle, l); });
  RunTwice(report, "cross entropy", {&lse, &picked, &total},
           [&](Launch l) { return CrossEntropyForward(args, l); });
  const std::vector<float> xs = logits.Values(), lses = want_lse.Values();
  std::vector<double> magnitudes(static_cast<size_t>(rows));
  for (int64_t i = 0; i < size; ++i) {
    magnitudes[static_cast<size_t>(i / cols)] += std::fabs(xs[static_cast<size_t>(i)]);
  }
  // log turns the sum's relative error into an absolute one; max + log rounds once more.
  report.Compare("cross entropy", "lse", lse, want_lse, [&](int64_t i) {
    return Rounding(DType::kF32, lses[static_cast<size_t>(i)]) + Sum(cols);
  });
  report.Compare("cross entropy", "picked", picked, want_picked, [](int64_t) { return 1e-30; });
  report.Compare("cross entropy", "total", total, want_total, [&](int64_t i) {
    return 2 * Sum(cols) * magnitudes[static_cast<size_t>(i)] + 1e-30;
  });

  const Array dlse(DType::kF32, random.Normals(rows)), dpicked(DType::kF32, random.Normals(rows)),
      dtotal(DType::kF32, random.Normals(rows));
  Array dx(dtype, size, shape.offset), want_dx(dtype, size, shape.offset);
  const CrossEntropyBackwardArgs backward{dtype,
                                          rows,
                                          cols,
                                          logits.data(),
                                          labels.data<const int32_t>(),
                                          want_lse.data<const float>(),
                                          dlse.data<const float>(),
                                          dpicked.data<const float>(),
                                          dtotal.data<const float>(),
                                          dx.data()};
  CrossEntropyBackwardArgs backward_oracle = backward;
  backward_oracle.dlogits = want_dx.data();
  RunOracle(report, "cross entropy backward", {&want_dx},
            [&](Launch l) { return naive::CrossEntropyBackward(backward_oracle, l); });
  RunTwice(report, "cross entropy backward", {&dx},
           [&](Launch l) { return CrossEntropyBackward(backward, l); });
  const std::vector<float> dxs = want_dx.Values(), dlses = dlse.Values(),
                           dpickeds = dpicked.Values(), dtotals = dtotal.Values();
  report.Compare("cross entropy backward", "dlogits", dx, want_dx, [&](int64_t i) {
    const size_t at = static_cast<size_t>(i), row = static_cast<size_t>(i / cols);
    // exp(x - lse) amplifies the rounding of x - lse, which may be infinite where it is 0; the
    // terms may cancel.
    const double exponent = double{xs[at]} - lses[row], p = std::exp(exponent);
    const double softmax = p == 0 ? 0 : std::fabs(p * dlses[row]) * (1 + std::fabs(exponent));
    return Rounding(dtype, dxs[at]) +
           4 * kFloatRoundoff * (softmax + std::fabs(dpickeds[row]) + std::fabs(dtotals[row]));
  });
}

// Rows of one thread, of part of a warp, of a warp, of a block; with tails; longer than what a
// block holds in registers (4 or 8 vectors of each of 512 or 1024 threads), of clusters of 2 to 8
// blocks, and longer than those. Groups of no row, of one and of many, as long as each other and
// not.
constexpr Shape kShapes[] = {{0, 1, 8},
                             {1, 0, 8},
                             {2, 0, 5},
                             {1, 3, 0},
                             {1, 1, 1},
                             {1, 130, 1},
                             {1, 7, 2},
                             {3, 5, 3},
                             {7, 143, 8},
                             {3, 11, 64},
                             {2, 7, 33},
                             {1, 17, 111},
                             {3, 3, 128},
                             {1, 9, 129},
                             {4, 16, 256},
                             {1, 37, 264},
                             {8, 5, 768},
                             {1, 13, 1000},
                             {1, 6, 1023},
                             {2, 9, 1280},
                             {1, 6, 2048},
                             {2, 3, 4096},
                             {1, 3, 4100},
                             {2, 3, 4104},
                             {1, 6, 5001},
                             {1, 3, 8192},
                             {1, 3, 12288},
                             {2, 1, 16384},
                             {1, 3, 20000},
                             {1, 2, 32768},
                             {1, 2, 32776},
                             {6, 1, 65544},
                             {2, 1, 65536},
                             {1, 1, 100003},
                             {1, 1, 16392},
                             {1, 2, 100000},
                             {1, 2, 131072},
                             {2, 6, 64, 1},
                             {3, 3, 768, 1},
                             {1, 3, 264, 2},
                             {1, 3, 5000, 1},
                             {1, 37, 264, 0, 5},
                             {2, 3, 768, 0, 7},
                             {1, 11, 16384, 0, 3},
                             {2, 13, 12296, 0, 2},
                             {1, 9, 65536, 0, 2},
                             {1, 7, 65528, 0, 3},
                             {2, 5, 40968, 0, 1},
                             {1, 8, 24576, 0, 5},
                             {1, 3, 16392, 0, 4}};

int Main(bool small) {
  Report report;
  for (const DType dtype : kDTypes) {
    for (const Shape& shape : kShapes) {
      // The naive kernels walk a group of rows with one thread, slow under compute-sanitizer; the
      // fast ones' loops over vectors start above 65536 columns.
      if (small && shape.rows * shape.cols > 21000 && shape.cols != 65544) continue;
      for (const DType param_dtype : {dtype, DType::kF32}) {
        for (const NormKind kind : {NormKind::kLayer, NormKind::kRms}) {
          for (const bool extra : {false, true}) {
            if (small && extra != (kind == NormKind::kLayer)) continue;
            TestNormForward(report, kind, dtype, param_dtype, shape, extra);
            TestNormBackward(report, kind, dtype, param_dtype, shape, extra);
          }
        }
        if (dtype == DType::kF32) break;
      }
      TestSoftmax(report, dtype, shape);
      if (shape.cols > 0) TestCrossEntropy(report, dtype, shape);
    }
  }
  // E[x^2] - E[x]^2 would lose all digits here: the variance is 4e-6 of the squared mean.
  TestNormForward(report, NormKind::kLayer, DType::kF32, DType::kF32, {1, 64, 768}, false, 1000);
  return report.Finish();
}

}  // namespace
}  // namespace zenith::test

int main(int argc, char** argv) { return zenith::test::Main(zenith::test::IsSmall(argc, argv)); }
