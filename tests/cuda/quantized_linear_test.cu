// QuantizedLinear against cuda/quantized_linear_naive.cu. How to build and run: CMakeLists.txt.
// With `--time` it prints microseconds instead, of a CUDA graph over weights of more bytes than the
// cache. ZENITH_HOPPER=0 in the environment runs the general kernel on a Hopper GPU.
#include <algorithm>
#include <array>

#include "cuda/naive.h"
#include "tests/cuda/harness.cuh"

namespace zenith::test {
namespace {

struct Problem {
  int32_t bits;
  bool transposed;
  int64_t rows, k, n, groups;
  bool float_params, bias;
};

std::vector<char> RandomBytes(Random& random, int64_t size) {
  std::vector<char> bytes(static_cast<size_t>(size));  // every value, -128 too
  for (size_t i = 0; i < bytes.size(); i += 8) {
    const uint64_t word = random.Bits();
    std::memcpy(&bytes[i], &word, std::min<size_t>(8, bytes.size() - i));
  }
  return bytes;
}

void Test(Report& report, DType dtype, const Problem& p) {
  report.Problem(dtype, std::to_string(p.bits) + " bits " + std::to_string(p.rows) + "x" +
                            std::to_string(p.k) + "x" + std::to_string(p.n) + ", " +
                            std::to_string(p.groups) + " groups" +
                            (p.transposed ? " transposed" : "") + (p.bias ? " bias" : "") +
                            (p.float_params ? " float parameters" : ""));
  Random random(static_cast<uint64_t>(p.rows + 3 * p.k + 7 * p.n + p.bits));
  const double largest = p.bits == 8 ? 128 : 8;
  std::vector<float> xs = random.Normals(p.rows * p.k);
  if (p.rows > 2) {  // rows of what no sum gives
    xs[static_cast<size_t>(p.k)] = NAN;
    xs[static_cast<size_t>(2 * p.k)] = INFINITY;
  }
  const DType param_dtype = p.float_params ? DType::kF32 : dtype;
  const Array x(dtype, xs), w(RandomBytes(random, p.k * p.n * p.bits / 8));
  const Array scale(param_dtype, random.Normals(p.groups * p.n, 1 / largest));
  const Array bias = p.bias ? Array(param_dtype, random.Normals(p.n)) : Array();
  Array y(dtype, p.rows * p.n), want(dtype, p.rows * p.n);
  const QuantizedLinearArgs args{.dtype = dtype,
                                 .param_dtype = param_dtype,
                                 .bits = p.bits,
                                 .transposed = p.transposed,
                                 .rows = p.rows,
                                 .k = p.k,
                                 .n = p.n,
                                 .groups = p.groups,
                                 .x = x.data(),
                                 .w = w.data(),
                                 .scale = scale.data(),
                                 .bias = bias.data(),
                                 .y = y.data()};
  QuantizedLinearArgs oracle = args;
  oracle.y = want.data();
  RunOracle(report, "forward", {&want},
            [&](Launch l) { return naive::QuantizedLinear(oracle, l); });
  RunTwice(report, "forward", {&y}, [&](Launch l) { return QuantizedLinear(args, l); });
  // One rounding; before it, float32 sums of k terms of deviation up to 1 (weights of all values
  // have 0.6 of the largest): 4 roundings of each, and the tensor cores cut off each sum of 16,
  // always downwards, in 4 chains or more, half a step on average.
  const double root = std::sqrt(double(p.k));
  const double sum_error =
      kFloatRoundoff * (4 * (8 + root * 4) + static_cast<double>(p.k) / 16 * root / 4);
  const std::vector<float> ys = want.Values();
  report.Compare(p.bits == 8 ? "int8" : "int4", "y", y, want, [&](int64_t i) {
    const double size = std::fabs(ys[static_cast<size_t>(i)]);
    return 2.01 * Roundoff(dtype) * size + sum_error * (1 + size) + Smallest(dtype);
  });
}

/// Microseconds of a call, over weights that take turns.
double Time(const Problem& p, DType dtype) {
  constexpr int64_t kBytes = int64_t{200} << 20;  // the second-level cache has 50 MB
  const int64_t w_bytes = p.k * p.n * p.bits / 8;
  const int64_t turns = std::max<int64_t>(2, (kBytes + w_bytes - 1) / w_bytes);
  Random random(1);
  const Array x(dtype, random.Normals(p.rows * p.k));
  const std::vector<char> bytes = RandomBytes(random, w_bytes);
  std::vector<Array> ws, scales;
  for (int64_t i = 0; i < turns; ++i) {
    ws.emplace_back(bytes);
    scales.emplace_back(dtype, random.Normals(p.groups * p.n, 1e-2));
  }
  Array y(dtype, p.rows * p.n);
  cudaStream_t stream;
  Check(cudaStreamCreate(&stream), "stream");
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (int64_t i = 0; i < turns; ++i) {
    const size_t at = static_cast<size_t>(i);
    const Status status =
        QuantizedLinear({dtype, dtype, p.bits, p.transposed, p.rows, p.k, p.n, p.groups, x.data(),
                         ws[at].data(), scales[at].data(), nullptr, y.data()},
                        Launch{stream});
    if (!status.ok()) std::printf("FAILED: %s\n", status.message);
  }
  Check(cudaStreamEndCapture(stream, &graph), "capture");
  Check(cudaGraphInstantiate(&executable, graph, 0), "graph");
  cudaEvent_t start, stop;
  Check(cudaEventCreate(&start), "event");
  Check(cudaEventCreate(&stop), "event");
  std::vector<float> times;
  for (int repeat = 0; repeat < 12; ++repeat) {
    Check(cudaEventRecord(start, stream), "record");
    Check(cudaGraphLaunch(executable, stream), "launch");
    Check(cudaEventRecord(stop, stream), "record");
    Check(cudaStreamSynchronize(stream), "time");
    float ms = 0;
    Check(cudaEventElapsedTime(&ms, start, stop), "elapsed");
    if (repeat > 1) times.push_back(1e3f * ms / static_cast<float>(turns));
  }
  std::sort(times.begin(), times.end());
  Check(cudaGraphExecDestroy(executable), "graph");
  Check(cudaGraphDestroy(graph), "graph");
  Check(cudaStreamDestroy(stream), "stream");
  return times[times.size() / 2];
}

int TimeAll() {
  std::printf("bfloat16, us a call and TB/s of weights, by rows\n%-44s", "");
  constexpr int64_t kRows[] = {1, 4, 8, 16};
  for (const int64_t rows : kRows) std::printf("%14lld", static_cast<long long>(rows));
  std::printf("\n");
  for (const auto& [k, n] :
       {std::pair<int64_t, int64_t>{4096, 4096}, {4096, 14336}, {14336, 4096}, {8192, 8192}})
    for (const bool transposed : {false, true})
      for (const auto& [bits, group] :
           {std::pair<int32_t, int64_t>{8, 0}, {4, 0}, {8, 128}, {4, 128}}) {
        const int64_t groups = group == 0 ? 1 : k / group;
        std::printf("%5lld x %5lld int%d%s, groups of %5lld  ", static_cast<long long>(k),
                    static_cast<long long>(n), bits, transposed ? " (n, k)" : "       ",
                    static_cast<long long>(k / groups));
        for (const int64_t rows : kRows) {
          const double us =
              Time({bits, transposed, rows, k, n, groups, false, false}, DType::kBF16);
          std::printf("  %6.2f  %4.2f", us, 1e-6 * double(k * n * bits / 8) / us);
        }
        std::printf("\n");
      }
  return 0;
}

int Main(bool small) {
  Report report;
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    int turn = 0;
    for (const int32_t bits : {8, 4})
      for (const bool transposed : {false, true})
        for (const auto& [k, n_of_8, groups] : std::initializer_list<std::array<int64_t, 3>>{
                 {64, 16, 1},
                 {80, 208, 1},  // half a stage of Hopper's is missing
                 {320, 208, 5},
                 {320, 208, 10},  // of 32
                 {704, 208, 11},  // a group for each of fewer warps than a block may have
                 {1024, 272, 1},
                 {2048, 656, 16},
                 {8192, 512, 1},
                 {192, 8528, 3},      // more tiles of 64 columns than multiprocessors,
                 {192, 17168, 1},     // of 128
                 {1408, 12304, 11}})  // groups, columns for the wide tiles of 16 rows
          for (const int64_t rows : {1, 3, 8, 9, 16}) {
            if (transposed && k / groups % 64 != 0) continue;
            const int64_t n = transposed || bits == 8 ? n_of_8 : (n_of_8 + 31) / 32 * 32;
            if (small && (k * n > 1024 * 272 || rows % 8 == 0)) continue;
            ++turn;
            Test(report, dtype,
                 {bits, transposed, rows, k, n, groups, turn % 3 == 0, turn % 2 == 0});
          }
    if (!small)
      for (const int32_t bits : {8, 4})
        Test(report, dtype, {bits, false, 5, 4096, 6176, 32, false, true});
    Test(report, dtype, {8, false, 0, 64, 64, 1, false, false});
  }
  return report.Finish();
}

}  // namespace
}  // namespace zenith::test

int main(int argc, char** argv) {
  const bool small = zenith::test::IsSmall(argc, argv);
  if (argc > 1 && std::strcmp(argv[1], "--time") == 0) return zenith::test::TimeAll();
  return zenith::test::Main(small);
}
