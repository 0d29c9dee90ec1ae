// LinearForward and GatedLinearForward against cuda/linear_naive.cu, LinearBackward against
// cuda/activation_naive.cu. How to build and run: CMakeLists.txt.
#include <array>
#include <limits>

#include "cuda/naive.h"
#include "tests/cuda/harness.cuh"

namespace zenith::test {
namespace {

const char* kNames[] = {"none", "relu", "relu_squared", "tanh", "silu", "gelu_tanh", "gelu_erf"};

struct Problem {
  int64_t rows, k, n;
  bool transposed, residual, pre, float_bias;
  Epilogue epilogue;
};

void Test(Report& report, DType dtype, const Problem& p) {
  report.Problem(dtype, std::string(kNames[static_cast<int>(p.epilogue)]) + " " +
                            std::to_string(p.rows) + "x" + std::to_string(p.k) + "x" +
                            std::to_string(p.n) + (p.transposed ? " transposed" : "") +
                            (p.residual ? " residual" : "") + (p.pre ? " pre" : "") +
                            (p.float_bias ? " float bias" : ""));
  Random random(static_cast<uint64_t>(p.rows + 3 * p.k + 7 * p.n));
  // Sums of deviation 2: both tails of every activation.
  std::vector<float> xs = random.Normals(p.rows * p.k, 2 / std::sqrt(double(p.k)));
  if (p.rows > 2) {  // a row of what no sum gives
    xs[static_cast<size_t>(p.k)] = NAN;
    xs[static_cast<size_t>(2 * p.k)] = std::numeric_limits<float>::infinity();
  }
  const Array x(dtype, xs);
  const Array w(dtype, random.Normals(p.k * p.n));
  const Array bias(p.float_bias ? DType::kF32 : dtype, random.Normals(p.n, 2));
  const Array residual = p.residual ? Array(dtype, random.Normals(p.rows * p.n)) : Array();
  Array y(dtype, p.rows * p.n), want(dtype, p.rows * p.n);
  Array pre = p.pre ? Array(dtype, p.rows * p.n) : Array();
  Array want_pre(dtype, p.rows * p.n);

  const LinearForwardArgs args{
      .epilogue = p.epilogue,
      .dtype = dtype,
      .bias_dtype = bias.dtype(),
      .layout = p.transposed ? WeightLayout::kColumns : WeightLayout::kRows,
      .rows = p.rows,
      .k = p.k,
      .n = p.n,
      .x = x.data(),
      .w = w.data(),
      .bias = bias.data(),
      .residual = residual.data(),
      .y = y.data(),
      .pre = pre.data()};
  LinearForwardArgs oracle = args;
  oracle.y = want.data();
  oracle.pre = want_pre.data();
  RunOracle(report, "forward", {&want, &want_pre},
            [&](Launch l) { return naive::LinearForward(oracle, l); });
  RunTwice(report, "forward", {&y, &pre}, [&](Launch l) { return LinearForward(args, l); });

  // Each result is rounded once. float32 sums of k terms of deviation 2 / sqrt(k) err by about
  // sqrt(k) roundings of their sum; an activation passes that on, a square at most 20 times, at
  // sums of 10. The fits: cuda/linear/epilogue.cuh.
  const double sum_error = kFloatRoundoff * 40 * (4 + std::sqrt(double(p.k)));
  const bool erf = p.epilogue == Epilogue::kGeluErf;
  const double fit = !erf ? 2e-6 : dtype == DType::kF16 ? 7.2e-5 : 7.1e-4;
  const std::vector<float> ys = want.Values(), pres = want_pre.Values();
  const std::vector<float> residuals = residual.Values();
  report.Compare("linear", "y", y, want, [&](int64_t i) {
    const size_t at = static_cast<size_t>(i);
    const double added = residuals.empty() ? 0 : std::fabs(residuals[at]);
    return 2.01 * Roundoff(dtype) * std::fabs(ys[at]) + fit * (std::fabs(ys[at]) + added) +
           sum_error + (erf ? 1e-10 : 0);
  });
  if (p.pre)
    report.Compare("linear", "pre", pre, want_pre, [&](int64_t i) {
      return 2.01 * Roundoff(dtype) * std::fabs(pres[static_cast<size_t>(i)]) + sum_error;
    });
}

void TestGated(Report& report, DType dtype, const Problem& p) {
  report.Problem(dtype, std::string("gated ") + kNames[static_cast<int>(p.epilogue)] + " " +
                            std::to_string(p.rows) + "x" + std::to_string(p.k) + "x" +
                            std::to_string(p.n) + (p.transposed ? " transposed" : "") +
                            (p.pre ? " pre" : ""));
  Random random(static_cast<uint64_t>(p.rows + 3 * p.k + 7 * p.n));
  std::vector<float> xs = random.Normals(p.rows * p.k, 2 / std::sqrt(double(p.k)));
  if (p.rows > 2) {
    xs[static_cast<size_t>(p.k)] = NAN;
    xs[static_cast<size_t>(2 * p.k)] = std::numeric_limits<float>::infinity();
  }
  const Array x(dtype, xs);
  const Array w_gate(dtype, random.Normals(p.k * p.n)), w_value(dtype, random.Normals(p.k * p.n));
  const int64_t size = p.rows * p.n;
  Array y(dtype, size), want(dtype, size), want_gate(dtype, size), want_value(dtype, size);
  Array gate = p.pre ? Array(dtype, size) : Array(), value = p.pre ? Array(dtype, size) : Array();
  const GatedLinearForwardArgs args{.epilogue = p.epilogue,
                                    .dtype = dtype,
                                    .transposed = p.transposed,
                                    .rows = p.rows,
                                    .k = p.k,
                                    .n = p.n,
                                    .x = x.data(),
                                    .w_gate = w_gate.data(),
                                    .w_value = w_value.data(),
                                    .y = y.data(),
                                    .gate = gate.data(),
                                    .value = value.data()};
  GatedLinearForwardArgs oracle = args;
  oracle.y = want.data();
  oracle.gate = want_gate.data();
  oracle.value = want_value.data();
  RunOracle(report, "gated", {&want, &want_gate, &want_value},
            [&](Launch l) { return naive::GatedLinearForward(oracle, l); });
  RunTwice(report, "gated", {&y, &gate, &value},
           [&](Launch l) { return GatedLinearForward(args, l); });
  // As a layer without a gate, above; the activation's error counts as often as value is large, and
  // value's as often as the activation is.
  const double sum_error = kFloatRoundoff * 40 * (4 + std::sqrt(double(p.k)));
  const bool erf = p.epilogue == Epilogue::kGeluErf;
  const double fit = !erf ? 2e-6 : dtype == DType::kF16 ? 7.2e-5 : 7.1e-4;
  const std::vector<float> ys = want.Values(), gates = want_gate.Values(),
                           values = want_value.Values();
  report.Compare("gated linear", "y", y, want, [&](int64_t i) {
    const size_t at = static_cast<size_t>(i);
    return (2.01 * Roundoff(dtype) + fit) * std::fabs(ys[at]) + 2 * Smallest(dtype) +
           sum_error * (std::fabs(values[at]) + std::fabs(gates[at])) +
           (erf ? 1e-10 * (1 + std::fabs(values[at])) : 0);
  });
  if (!p.pre) return;
  report.Compare("gated linear", "gate", gate, want_gate, [&](int64_t i) {
    return 2.01 * Roundoff(dtype) * std::fabs(gates[static_cast<size_t>(i)]) + sum_error;
  });
  report.Compare("gated linear", "value", value, want_value, [&](int64_t i) {
    return 2.01 * Roundoff(dtype) * std::fabs(values[static_cast<size_t>(i)]) + sum_error;
  });
}

void TestBackward(Report& report, Activation kind, DType dtype, int64_t groups, int64_t rows,
                  int64_t n, int64_t offset) {
  report.Problem(dtype, "backward " + std::to_string(static_cast<int>(kind)) + " of " +
                            std::to_string(groups) + "x" + std::to_string(rows) + "x" +
                            std::to_string(n) + (offset ? ", unaligned" : ""));
  Random random(static_cast<uint64_t>(groups + 3 * rows + 7 * n));
  const int64_t size = groups * rows * n;
  const Array pre(dtype, random.Normals(size, 2), offset);
  const Array dy(dtype, random.Normals(size, 1, 10), offset);
  Array dpre(dtype, size, offset), want(dtype, size);
  Array dbias(DType::kF32, groups * n, offset), want_dbias(DType::kF32, groups * n);
  const LinearBackwardArgs args{
      kind, dtype, groups, rows, n, pre.data(), dy.data(), dpre.data(), dbias.data<float>()};
  LinearBackwardArgs oracle = args;
  oracle.dpre = want.data();
  oracle.dbias = want_dbias.data<float>();
  RunOracle(report, "backward", {&want, &want_dbias},
            [&](Launch l) { return naive::LinearBackward(oracle, l); });
  RunTwice(report, "backward", {&dpre, &dbias}, [&](Launch l) { return LinearBackward(args, l); });
  // As the activation's own derivative (activation_test.cu): sums of two terms that cancel.
  const std::vector<float> wanted = want.Values(), dys = dy.Values();
  report.Compare("linear backward", "dpre", dpre, want, [&](int64_t i) {
    return 2.01 * Roundoff(dtype) * std::fabs(wanted[static_cast<size_t>(i)]) +
           kFloatRoundoff * 16 * std::fabs(dys[static_cast<size_t>(i)]) + 2 * Smallest(dtype);
  });
  // Terms of at most 1.2 * 4 * 10, each as exact as dpre before rounding, and their sums.
  report.Compare("linear backward", "dbias", dbias, want_dbias, [&](int64_t) {
    return kFloatRoundoff * 50 * (16 + static_cast<double>(rows)) * std::sqrt(double(rows) + 1);
  });
}

int Main(bool small) {
  Report report;
  constexpr Epilogue kEpilogues[] = {Epilogue::kNone,   Epilogue::kRelu, Epilogue::kReluSquared,
                                     Epilogue::kTanh,   Epilogue::kSilu, Epilogue::kGeluTanh,
                                     Epilogue::kGeluErf};
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    int turn = 0;
    for (const Epilogue epilogue : kEpilogues)
      for (const bool transposed : {false, true}) {
        ++turn;
        Test(report, dtype,
             {130, 72, 200, transposed, turn % 2 == 0, turn % 3 == 0, turn % 4 == 1, epilogue});
      }
    // Rows and columns of no whole tile; one step and many; one tile and rounds of them.
    for (const auto& [rows, k, n] :
         std::initializer_list<std::array<int64_t, 3>>{{1, 8, 8},
                                                       {3, 64, 16},
                                                       {128, 128, 192},
                                                       {257, 1000, 776},
                                                       {700, 320, 1032},
                                                       {4000, 256, 3080}}) {
      if (small && rows * n > 300 * 776) continue;
      for (const bool transposed : {false, true})
        for (const bool more : {false, true})
          Test(report, dtype, {rows, k, n, transposed, more, more, false, Epilogue::kGeluErf});
    }
    if (!small) Test(report, dtype, {16384, 64, 1536, false, true, true, true, Epilogue::kNone});
    Test(report, dtype, {0, 64, 64, false, false, false, false, Epilogue::kNone});
    for (const bool transposed : {false, true}) {
      for (const Epilogue epilogue : {Epilogue::kSilu, Epilogue::kGeluTanh, Epilogue::kGeluErf})
        TestGated(report, dtype, {130, 72, 200, transposed, false, true, false, epilogue});
      TestGated(report, dtype, {5, 8, 8, transposed, false, false, false, Epilogue::kSilu});
      TestGated(report, dtype, {257, 1000, 776, transposed, false, true, false, Epilogue::kSilu});
      TestGated(report, dtype, {1000, 448, 64, transposed, false, false, false, Epilogue::kSilu});
      if (!small)
        TestGated(report, dtype,
                  {4000, 256, 3080, transposed, false, true, false, Epilogue::kSilu});
    }
  }
  for (const DType dtype : kDTypes)
    for (const Activation kind : {Activation::kGeluErf, Activation::kGeluTanh, Activation::kSilu}) {
      TestBackward(report, kind, dtype, 3, 7, 24, 0);
      TestBackward(report, kind, dtype, 2, 4, 1032, 0);
      TestBackward(report, kind, dtype, 5, 1, 3, 0);
      TestBackward(report, kind, dtype, 2, 9, 16, 1);
      TestBackward(report, kind, dtype, 2, 0, 16, 0);
      if (!small) TestBackward(report, kind, dtype, 256, 32, 3072, 0);
    }
  return report.Finish();
}

}  // namespace
}  // namespace zenith::test

int main(int argc, char** argv) { return zenith::test::Main(zenith::test::IsSmall(argc, argv)); }
