#include "tests/cpp/harness.h"

namespace zenith::test {

void TestAttention(const CpuKernels&, Report&) {}
void TimeAttention(const CpuKernels&, const Launch&, Report&) {}

}  // namespace zenith::test
