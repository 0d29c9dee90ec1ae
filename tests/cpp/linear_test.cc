#include <cmath>

#include "tests/cpp/harness.h"

namespace zenith::test {
namespace {

struct Case {
  Epilogue epilogue;
  WeightLayout layout;
  bool residual;
  int64_t rows, k, n;
};

int64_t IndexOfWeight(const Case& c, int64_t k, int64_t j) {
  switch (c.layout) {
    case WeightLayout::kRows:
      return k * c.n + j;
    case WeightLayout::kColumns:
      return j * c.k + k;
    case WeightLayout::kPanels:
      return (j / kPanelColumns * c.k + k) * kPanelColumns + j % kPanelColumns;
  }
  return -1;
}

double Activated(Epilogue epilogue, double x) {
  switch (epilogue) {
    case Epilogue::kNone:
      return x;
    case Epilogue::kRelu:
      return x > 0 ? x : x * 0;
    case Epilogue::kReluSquared:
      return x > 0 ? x * x : x * 0;
    case Epilogue::kTanh:
      return std::tanh(x);
    case Epilogue::kSilu:
      return x / (1 + std::exp(-x));
    case Epilogue::kGeluTanh:
      return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Epilogue::kGeluErf:
      return x / 2 * std::erfc(-x / std::sqrt(2));
  }
  return NAN;
}

double TestCase(const CpuKernels& kernels, const Case& c, const Launch& launch, Report& report) {
  std::mt19937_64 random(5);
  std::vector<double> values = RandomValues(random, c.rows * c.k);
  if (c.rows > 3 && c.k > 2) values[c.k + 1] = std::nan("");
  const Tensor x(DType::kF32, values), w(DType::kF32, RandomValues(random, c.k * c.n));
  const Tensor bias(DType::kF32, RandomValues(random, c.n));
  const Tensor residual(DType::kF32, RandomValues(random, c.rows * c.n));

  const auto run = [&](const Launch& on, Tensor& y, Tensor* pre, int64_t rows) {
    const Status status = kernels.linear_forward(
        {c.epilogue, DType::kF32, DType::kF32, c.layout, rows, c.k, c.n, x.data(), w.data(),
         bias.data(), c.residual ? residual.data() : nullptr, y.data(),
         pre == nullptr ? nullptr : pre->data()},
        on);
    report.Require(status.ok(), "linear returns ok");
  };
  Tensor y(DType::kF32, c.rows * c.n), pre(DType::kF32, c.rows * c.n);
  run(launch, y, &pre, c.rows);
  Tensor alone(DType::kF32, c.rows * c.n);
  run({nullptr, 1, nullptr}, alone, nullptr, c.rows);
  report.Require(y.SameBits(alone), "linear does not depend on threads");
  if (c.rows > 1) {
    Tensor first(DType::kF32, c.n);
    run(launch, first, nullptr, 1);
    bool same = true;
    for (int64_t j = 0; j < c.n; ++j) same &= first[j] == y[j];
    report.Require(same, "a row of a linear layer does not depend on the others");
  }

  Error error, pre_error;
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.n; ++j) {
      double sum = bias[j], magnitude = std::fabs(bias[j]) + 1;
      for (int64_t k = 0; k < c.k; ++k) {
        const double term = x[i * c.k + k] * w[IndexOfWeight(c, k, j)];
        sum += term;
        magnitude += std::fabs(term);
      }
      if (std::isnan(sum)) magnitude = 1;
      pre_error.Add(pre, i * c.n + j, sum, magnitude);
      // The derivatives are at most 1.13, of the squared relu 2 x.
      const double slope = c.epilogue == Epilogue::kReluSquared ? 1 + 2 * std::fabs(sum) : 1.2;
      const double more = c.residual ? residual[i * c.n + j] : 0;
      error.Add(y, i * c.n + j, Activated(c.epilogue, sum) + more,
                (std::isnan(sum) ? 1 : magnitude * slope) + std::fabs(more));
    }
  }
  return std::max(error.max(), pre_error.max());
}

}  // namespace

void TestLinear(const CpuKernels& kernels, Report& report) {
  Pool pool(3);
  const Launch launch = pool.launch();
  constexpr Epilogue kEpilogues[] = {Epilogue::kNone,   Epilogue::kRelu, Epilogue::kReluSquared,
                                     Epilogue::kTanh,   Epilogue::kSilu, Epilogue::kGeluTanh,
                                     Epilogue::kGeluErf};
  double worst = 0;
  for (const Epilogue epilogue : kEpilogues) {
    for (const WeightLayout layout : {WeightLayout::kRows, WeightLayout::kColumns}) {
      worst =
          std::max(worst, TestCase(kernels, {epilogue, layout, true, 11, 33, 70}, launch, report));
    }
  }
  // Rows of every tile and of two tasks; whole and partial vectors, panels and chunks.
  for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 13, 200}) {
    for (const auto& [k, n] :
         {std::pair<int64_t, int64_t>{1, 1}, {5, 16}, {400, 64}, {33, 192}, {769, 49}, {8, 150}}) {
      for (const WeightLayout layout :
           {WeightLayout::kRows, WeightLayout::kColumns, WeightLayout::kPanels}) {
        if (layout == WeightLayout::kPanels && n % kPanelColumns != 0) continue;
        const Case c{Epilogue::kNone, layout, rows % 2 == 0, rows, k, n};
        worst = std::max(worst, TestCase(kernels, c, launch, report));
      }
    }
  }
  // A sum of k terms in order is off by k / 2 ulp of their magnitudes at most, and by far less.
  report.Add("linear", kernels, DType::kF32, worst, 4);

  Tensor empty(DType::kF32, 0);
  const LinearForwardArgs nothing{
      Epilogue::kNone, DType::kF32,  DType::kF32, WeightLayout::kRows, 0,      3, 0, empty.data(),
      empty.data(),    empty.data(), nullptr,     empty.data(),        nullptr};
  report.Require(kernels.linear_forward(nothing, launch).ok(), "an empty linear layer");
  LinearForwardArgs half = nothing;
  half.dtype = DType::kF16;
  report.Require(!kernels.linear_forward(half, launch).ok(), "linear says that it is for float32");
}

void TimeLinear(const CpuKernels& kernels, const Launch& launch, Report& report) {
  std::mt19937_64 random(5);
  constexpr int64_t kLayers = 12;  // so that weights come from where a model's do
  for (const int64_t rows : {1, 32, 128, 512}) {
    for (const auto& [k, n] : {std::pair<int64_t, int64_t>{384, 384}, {384, 1536}, {1536, 384}}) {
      const Tensor x(DType::kF32, RandomValues(random, rows * k));
      const Tensor w(DType::kF32, RandomValues(random, kLayers * k * n));
      const Tensor bias(DType::kF32, RandomValues(random, n));
      Tensor y(DType::kF32, rows * n);
      for (const auto& [layout, name] : {std::pair{WeightLayout::kRows, ""},
                                         {WeightLayout::kColumns, ", (n, k)"},
                                         {WeightLayout::kPanels, ", panels"}}) {
        int64_t layer = 0;
        const double ms = BestTime([&] {
          const float* const from = static_cast<const float*>(w.data()) + layer++ % kLayers * k * n;
          (void)kernels.linear_forward({Epilogue::kNone, DType::kF32, DType::kF32, layout, rows, k,
                                        n, x.data(), from, bias.data(), nullptr, y.data(), nullptr},
                                       launch);
        });
        report.Time("linear " + std::to_string(rows) + " x " + std::to_string(k) + " x " +
                        std::to_string(n) + name,
                    kernels, DType::kF32, ms, 2e-6 * static_cast<double>(rows * k * n) / ms,
                    "GFLOP/s");
      }
    }
  }
}

}  // namespace zenith::test
