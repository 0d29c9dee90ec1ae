// Every CPU kernel, in every instruction set this machine runs, against naive float64 oracles. How
// to build: CMakeLists.txt. `--time [activation|softmax|norm|attention|linear]` measures instead.
// Exits non-zero when an error is above its limit.
#include <cstdio>
#include <cstring>
#include <thread>

#include "tests/cpp/harness.h"

int main(int argc, char** argv) {
  using namespace zenith;
  std::setvbuf(stdout, nullptr, _IOLBF, 1 << 12);  // rows appear as they are measured
  test::Report report;
  const bool time = argc > 1 && std::strcmp(argv[1], "--time") == 0;
  const char* const filter = argc > 2 ? argv[2] : "";
  for (const CpuKernels* kernels : RunnableCpuKernels().tables) {
    if (kernels == nullptr) break;
    if (time) {
      test::Pool pool(static_cast<int>(std::thread::hardware_concurrency()));
      const Launch launch = pool.launch();
      if (std::strstr("activation", filter)) test::TimeActivation(*kernels, launch, report);
      if (std::strstr("softmax", filter)) test::TimeSoftmax(*kernels, launch, report);
      if (std::strstr("norm", filter)) test::TimeNorm(*kernels, launch, report);
      if (std::strstr("attention", filter)) test::TimeAttention(*kernels, launch, report);
      if (std::strstr("linear", filter)) test::TimeLinear(*kernels, launch, report);
    } else {
      test::TestActivation(*kernels, report);
      test::TestSoftmax(*kernels, report);
      test::TestCrossEntropy(*kernels, report);
      test::TestNorm(*kernels, report);
      test::TestGroupNorm(*kernels, report);
      test::TestAttention(*kernels, report);
      test::TestLinear(*kernels, report);
      test::TestConv(*kernels, report);
      test::TestQuantizedLinear(*kernels, report);
    }
  }
  std::printf(report.failures() == 0 ? "all right\n" : "%d FAILED\n", report.failures());
  return report.failures() == 0 ? 0 : 1;
}
