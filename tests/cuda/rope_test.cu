// Rope against cuda/rope_naive.cu. How to build and run: CMakeLists.txt. `--time` measures instead.
#include <chrono>

#include "cuda/naive.h"
#include "tests/cuda/harness.cuh"

namespace zenith::test {
namespace {

struct Problem {
  bool interleaved, transposed, whole;
  int64_t cols, features;
  TableRows rows;
};

int64_t Rows(const TableRows& rows) {
  int64_t product = 1;
  for (const int64_t size : rows.sizes) product *= size;
  return product;
}
int64_t TableSize(const TableRows& rows) {
  int64_t last = 0;
  for (int axis = 0; axis < TableRows::kRank; ++axis) {
    last += (rows.sizes[axis] - 1) * rows.strides[axis];
  }
  return last + 1;
}

void Test(Report& report, DType dtype, const Problem& p, int64_t offset) {
  const int64_t rows = Rows(p.rows), size = rows * p.cols;
  const int64_t width = p.whole ? p.features : p.features / 2;
  report.Problem(dtype, std::string(p.interleaved ? "pairs" : "halves") +
                            (p.transposed ? ", transposed" : "") + (p.whole ? ", whole" : "") +
                            " of " + std::to_string(p.features) + " of " + std::to_string(rows) +
                            "x" + std::to_string(p.cols) + (offset ? ", unaligned" : ""));
  Random random(1);
  std::vector<float> values = random.Normals(size, 3, 10);
  if (size > 40) values[7] = NAN, values[8] = HUGE_VALF, values[33] = -HUGE_VALF;
  const Array x(dtype, values, offset);
  const int64_t table_size = rows == 0 ? 0 : TableSize(p.rows) * width;
  const Array cos(DType::kF32, random.Normals(table_size)),
      sin(DType::kF32, random.Normals(table_size));
  Array y(dtype, size, offset), want(dtype, size);
  const RopeArgs args{
      dtype,  p.interleaved, p.transposed,      p.whole,           rows,    p.cols, p.features,
      p.rows, x.data(),      cos.data<float>(), sin.data<float>(), y.data()};
  RopeArgs oracle = args;
  oracle.y = want.data();
  RunOracle(report, "rope", {&want}, [&](Launch l) { return naive::Rope(oracle, l); });
  RunTwice(report, "rope", {&y}, [&](Launch l) { return Rope(args, l); });
  // A product that is rounded before its sum, and the sum: |x| up to 120, coefficients up to 4.
  const std::vector<float> exact = want.Values();
  report.Compare("rope", "y", y, want, [&](int64_t i) {
    return 2.01 * Roundoff(dtype) * std::fabs(exact[static_cast<size_t>(i)]) +
           kFloatRoundoff * 1000 + 2 * Smallest(dtype);
  });
  // In place.
  Array both(dtype, values, offset);
  RopeArgs in_place = args;
  in_place.x = both.data();
  in_place.y = both.data();
  report.Require(Rope(in_place, Launch{nullptr}), "in place");
  Check(cudaDeviceSynchronize(), "in place");
  report.Require(both.Download(0).first == y.Download(0).first, "in place gives other bits");
}

/// Query and key of 4 x 4096 x (32 + 8) x 128.
void Time(DType dtype, bool interleaved, bool transposed, bool heads_outside) {
  const int64_t b = 4, t = 4096, d = 128;
  const Array cos(DType::kF32, std::vector<float>(static_cast<size_t>(t * d / 2), 0.5f));
  std::vector<Array> xs, ys;
  for (const int64_t h : {32, 8}) {
    xs.emplace_back(dtype, b * t * h * d);
    ys.emplace_back(dtype, b * t * h * d);
    xs.back().Fill(0);
  }
  const auto run = [&] {
    for (size_t i = 0; i < 2; ++i) {
      const int64_t h = i == 0 ? 32 : 8;
      const TableRows rows = heads_outside ? TableRows{{1, 1, b * h, t}, {0, 0, 0, 1}}
                                           : TableRows{{1, b, t, h}, {0, 0, 1, 0}};
      const RopeArgs args{
          dtype,        interleaved,       transposed,        false,       b * t * h, d, d, rows,
          xs[i].data(), cos.data<float>(), cos.data<float>(), ys[i].data()};
      if (!Rope(args, Launch{nullptr}).ok()) std::exit(1);
    }
  };
  const int64_t bytes = 2 * b * t * 40 * d * SizeOf(dtype);
  const auto microseconds = [&](auto&& body) {
    for (int i = 0; i < 3; ++i) body();
    Check(cudaDeviceSynchronize(), "time");
    constexpr int kRuns = 50;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kRuns; ++i) body();
    Check(cudaDeviceSynchronize(), "time");
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
               .count() /
           kRuns;
  };
  const double ours = microseconds(run);
  const double copy = microseconds([&] {
    for (size_t i = 0; i < 2; ++i) {
      Check(cudaMemcpyAsync(ys[i].data(), xs[i].data(),
                            static_cast<size_t>(xs[i].size() * SizeOf(dtype)),
                            cudaMemcpyDeviceToDevice),
            "copy");
    }
  });
  std::printf("%s %s%s%s: %.1f us, %.0f GB/s; a copy %.1f us: %.3f of its speed\n", Name(dtype),
              interleaved ? "pairs" : "halves", transposed ? " back" : "",
              heads_outside ? ", heads outside" : "", ours,
              static_cast<double>(bytes) / ours * 1e-3, copy, copy / ours);
}

int Main(bool small) {
  Report report;
  const TableRows layouts[] = {
      {{1, 2, 5, 4}, {0, 0, 1, 0}},  // b t h, tables of t
      {{1, 2, 5, 3}, {0, 0, 1, 0}},  // rows that do not come in fours
      {{1, 1, 6, 5}, {0, 0, 0, 1}},  // b h t
      {{1, 2, 5, 8}, {0, 5, 1, 0}},  // tables of b t
      {{2, 3, 2, 4}, {2, 0, 1, 0}}, {{1, 1, 1, 7}, {0, 0, 0, 1}},
      {{1, 1, 1, 1}, {0, 0, 0, 0}}, {{1, 1, 0, 4}, {0, 0, 1, 0}},
  };
  const std::pair<int64_t, int64_t> sizes[] = {{2, 2},   {3, 2},    {8, 8},     {16, 16}, {37, 10},
                                               {64, 64}, {128, 32}, {128, 128}, {80, 16}, {8, 0}};
  for (const DType dtype : kDTypes) {
    for (const TableRows& rows : layouts) {
      for (const auto& [cols, features] : sizes) {
        for (int flags = 0; flags < 8; ++flags) {
          if (small && flags != 1 && flags != 6) continue;
          Test(report, dtype,
               {(flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0, cols, features, rows}, 0);
        }
      }
    }
    for (const bool interleaved : {false, true}) {
      Test(report, dtype, {interleaved, false, false, 64, 64, layouts[0]}, 1);
      if (!small)
        Test(report, dtype, {interleaved, true, false, 128, 128, {{1, 3, 1000, 16}, {0, 0, 1, 0}}},
             0);
    }
  }
  return report.Finish();
}

}  // namespace
}  // namespace zenith::test

int main(int argc, char** argv) {
  using namespace zenith;
  const bool small = test::IsSmall(argc, argv);
  if (argc > 1 && std::strcmp(argv[1], "--time") == 0) {
    for (const DType dtype : {DType::kBF16, DType::kF32}) {
      for (const bool interleaved : {true, false}) {
        test::Time(dtype, interleaved, false, false);
        test::Time(dtype, interleaved, true, false);
        test::Time(dtype, interleaved, false, true);
      }
    }
    return 0;
  }
  return test::Main(small);
}
