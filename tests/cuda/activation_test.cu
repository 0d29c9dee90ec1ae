// ActivationForward and ActivationBackward against cuda/activation_naive.cu. How to build and run:
// CMakeLists.txt.
#include <limits>

#include "cuda/naive.h"
#include "tests/cuda/harness.cuh"

namespace zenith::test {
namespace {

const char* Name(Activation kind) {
  return kind == Activation::kGeluErf    ? "gelu_erf"
         : kind == Activation::kGeluTanh ? "gelu_tanh"
                                         : "silu";
}

/// Normal values with outliers; where there is room, what no distribution gives.
std::vector<float> Inputs(Random& random, int64_t size) {
  std::vector<float> values = random.Normals(size, 3, 10);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float special[] = {NAN, kInfinity, -kInfinity, 0, -0.f, 6e4f, -6e4f, -12, 1e-7f};
  constexpr int64_t kSpecial = sizeof(special) / sizeof(special[0]);
  for (int64_t i = 0; size > 2 * kSpecial && i < kSpecial; ++i) {
    values[static_cast<size_t>(i)] = values[static_cast<size_t>(size - 1 - i)] = special[i];
  }
  return values;
}

void Test(Report& report, Activation kind, DType dtype, int64_t size, int64_t offset) {
  report.Problem(dtype, std::string(Name(kind)) + " of " + std::to_string(size) +
                            (offset ? ", unaligned" : ""));
  Random random(1);
  const Array x(dtype, Inputs(random, size), offset);
  const Array dy(dtype, random.Normals(size, 1, 30), offset);
  Array y(dtype, size, offset), want(dtype, size);

  const ActivationForwardArgs forward{kind, dtype, size, x.data(), y.data()};
  ActivationForwardArgs oracle = forward;
  oracle.y = want.data();
  RunOracle(report, "forward", {&want},
            [&](Launch l) { return naive::ActivationForward(oracle, l); });
  RunTwice(report, "forward", {&y}, [&](Launch l) { return ActivationForward(forward, l); });

  // Both results are rounded once. Before that y = x * F(x), and F = exp(something) in the tail:
  // float32 gives the something = ln(y / x) to half a unit, and so the exponential to |ln(y / x)|
  // units; __expf of the 16-bit types to twice that.
  const double rounding = 2.01 * Roundoff(dtype);
  const std::vector<float> xs = x.Values(), dys = dy.Values(), ys = want.Values();
  report.Compare("activation forward", "y", y, want, [&](int64_t i) {
    const double magnitude = std::fabs(ys[static_cast<size_t>(i)]);
    const double tail =
        magnitude > 0 ? std::fabs(std::log(magnitude / std::fabs(xs[static_cast<size_t>(i)]))) : 0;
    return (rounding + kFloatRoundoff * (24 + 4 * tail)) * magnitude + 2 * Smallest(dtype);
  });

  Array dx(dtype, size, offset);
  const ActivationBackwardArgs backward{kind, dtype, size, x.data(), dy.data(), dx.data()};
  ActivationBackwardArgs backward_oracle = backward;
  backward_oracle.dx = want.data();
  RunOracle(report, "backward", {&want},
            [&](Launch l) { return naive::ActivationBackward(backward_oracle, l); });
  RunTwice(report, "backward", {&dx}, [&](Launch l) { return ActivationBackward(backward, l); });

  // f' is a sum of two terms of at most 1.2 that cancel near x = -0.75: an absolute bound.
  const std::vector<float> dxs = want.Values();
  report.Compare("activation backward", "dx", dx, want, [&](int64_t i) {
    return rounding * std::fabs(dxs[static_cast<size_t>(i)]) +
           kFloatRoundoff * 16 * std::fabs(dys[static_cast<size_t>(i)]) + 2 * Smallest(dtype);
  });
}

/// `stride` = 2 * cols: gate and value are the halves of one array, the gate second.
void TestGated(Report& report, Activation kind, DType dtype, int64_t rows, int64_t cols,
               bool halves, int64_t offset) {
  report.Problem(dtype, "gated " + std::string(Name(kind)) + " of " + std::to_string(rows) + "x" +
                            std::to_string(cols) + (halves ? ", halves" : "") +
                            (offset ? ", unaligned" : ""));
  Random random(1);
  const int64_t size = rows * cols, stride = halves ? 2 * cols : cols;
  const int64_t bytes = dtype == DType::kF32 ? 4 : 2;
  const Array gates(dtype, Inputs(random, rows * stride), offset);
  const Array values(dtype, random.Normals(rows * stride, 1, 10), offset);
  const Array dy(dtype, random.Normals(size, 1, 10), offset);
  Array y(dtype, size, offset), want(dtype, size);
  Array dgates(dtype, rows * stride, offset), dvalues(dtype, rows * stride, offset);
  Array want_dgates(dtype, rows * stride), want_dvalues(dtype, rows * stride);
  const auto gate_of = [&](const Array& a) { return a.data<char>() + (halves ? cols * bytes : 0); };
  const auto value_of = [&](const Array& gates, const Array& values) {
    return halves ? gates.data() : values.data();
  };

  const GatedForwardArgs forward{
      kind, dtype, rows, cols, stride, gate_of(gates), value_of(gates, values), y.data()};
  GatedForwardArgs oracle = forward;
  oracle.y = want.data();
  RunOracle(report, "gated forward", {&want},
            [&](Launch l) { return naive::GatedForward(oracle, l); });
  RunTwice(report, "gated forward", {&y}, [&](Launch l) { return GatedForward(forward, l); });
  // As in Test: the tail's exponential, here of a gate that a value multiplies.
  const double rounding = 2.01 * Roundoff(dtype);
  const std::vector<float> ys = want.Values();
  report.Compare("gated forward", "y", y, want, [&](int64_t i) {
    const double magnitude = std::fabs(ys[static_cast<size_t>(i)]);
    return (rounding + kFloatRoundoff * 400) * magnitude + 20 * Smallest(dtype);
  });

  const GatedBackwardArgs backward{kind,
                                   dtype,
                                   rows,
                                   cols,
                                   stride,
                                   gate_of(gates),
                                   value_of(gates, values),
                                   dy.data(),
                                   gate_of(dgates),
                                   value_of(dgates, dvalues)};
  GatedBackwardArgs backward_oracle = backward;
  backward_oracle.dgate = gate_of(want_dgates);
  backward_oracle.dvalue = value_of(want_dgates, want_dvalues);
  const auto oracle_launch = [&](Launch l) { return naive::GatedBackward(backward_oracle, l); };
  const auto launch = [&](Launch l) { return GatedBackward(backward, l); };
  if (halves) {
    RunOracle(report, "gated backward", {&want_dgates}, oracle_launch);
    RunTwice(report, "gated backward", {&dgates}, launch);
  } else {
    RunOracle(report, "gated backward", {&want_dgates, &want_dvalues}, oracle_launch);
    RunTwice(report, "gated backward", {&dgates, &dvalues}, launch);
  }
  for (const bool of_value : {false, true}) {
    if (of_value && halves) continue;
    const Array& wanted = of_value ? want_dvalues : want_dgates;
    const std::vector<float> exact = wanted.Values();
    report.Compare("gated backward", of_value ? "dvalue" : "dgate", of_value ? dvalues : dgates,
                   wanted, [&](int64_t i) {
                     // Products of dy and value, up to 1e3 in outliers, with sums that cancel near
                     // zeros of f'.
                     return (rounding + kFloatRoundoff * 400) *
                                std::fabs(exact[static_cast<size_t>(i)]) +
                            kFloatRoundoff * 16 * 1e3 + 20 * Smallest(dtype);
                   });
  }
}

int Main(bool small) {
  Report report;
  for (const DType dtype : kDTypes) {
    for (const Activation kind : {Activation::kGeluErf, Activation::kGeluTanh, Activation::kSilu}) {
      for (const int64_t size : {0, 1, 7, 8, 9, 100, 1000, 4097, 65536, 1000003}) {
        if (small && size > 4097) continue;
        Test(report, kind, dtype, size, 0);
      }
      for (const int64_t size : {1, 8, 4099}) Test(report, kind, dtype, size, 1);
      for (const int64_t cols : {1, 7, 8, 96, 4096}) {
        for (const int64_t rows : {1, 3, 50}) {
          if (small && rows * cols > 4096) continue;
          for (const bool halves : {false, true}) {
            TestGated(report, kind, dtype, rows, cols, halves, 0);
          }
        }
        TestGated(report, kind, dtype, 2, cols, true, 1);
      }
    }
  }
  return report.Finish();
}

}  // namespace
}  // namespace zenith::test

int main(int argc, char** argv) { return zenith::test::Main(zenith::test::IsSmall(argc, argv)); }
