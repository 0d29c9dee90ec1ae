// The activation's derivative and the bias's gradient of a linear layer; the contract is
// ffi/kernels/linear.h.
#include "cuda/activation.cuh"
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/vector.cuh"
#include "ffi/kernels/linear.h"

namespace zenith {
namespace {

constexpr int kRowLanes = 8;  // warps of a block, each with a row of 512 bytes at a time
constexpr int kThreads = kRowLanes * kWarpSize;
constexpr int kRowsInFlight = 2;    // of a thread, two loads of 16 bytes each
constexpr int kBlocksResident = 4;  // of a multiprocessor: 64 KiB in flight; 5 of them spill

/// A block has kSize columns a lane of a group: its warps take turns at the rows. pre and dy are
/// read once, dpre is written once, and the sums stay in registers until the warps' are added up.
template <Activation kKind, typename T, int kSize>
__global__ void __launch_bounds__(kThreads, kBlocksResident)
    linear_backward_kernel(LinearBackwardArgs args) {
  using Function = ActivationFunction<kKind, T>;
  constexpr int kColumns = kSize * kWarpSize;
  __shared__ float sSums[kRowLanes][kColumns];
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t first_col = int64_t{blockIdx.y} * kColumns, col = first_col + lane * kSize;
  float sums[kSize] = {};
  if (col < args.n) {
    const int64_t start = (int64_t{blockIdx.x} * args.rows_per_group + warp) * args.n + col;
    const T* gPre = static_cast<const T*>(args.pre) + start;
    const T* gDy = static_cast<const T*>(args.dy) + start;
    T* gDpre = static_cast<T*>(args.dpre) + start;
    const int64_t step = kRowLanes * args.n, rows = args.rows_per_group - warp;
    for (int64_t r = 0; r < rows; r += kRowLanes * kRowsInFlight) {
      Vector<T, kSize> pre[kRowsInFlight], dy[kRowsInFlight];
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (r + i * kRowLanes >= rows) continue;
        pre[i] = LoadReadOnly<kSize>(gPre + i * step);
        dy[i] = LoadReadOnly<kSize>(gDy + i * step);
      }
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i) {
        if (r + i * kRowLanes >= rows) continue;
        float x[kSize], dx[kSize];
        ToFloat(pre[i], x);
        ToFloat(dy[i], dx);
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          dx[j] *= Function::Derivative(x[j]);
          sums[j] += dx[j];
        }
        StoreVector(gDpre + i * step, FromFloat<T>(dx));
      }
      gPre += kRowsInFlight * step;
      gDy += kRowsInFlight * step;
      gDpre += kRowsInFlight * step;
    }
  }
  StoreVector(sSums[warp] + lane * kSize, FromFloat<float>(sums));
  __syncthreads();
  const int64_t own = first_col + threadIdx.x;
  if (threadIdx.x >= kColumns || own >= args.n) return;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kRowLanes; ++i) sum += sSums[i][threadIdx.x];
  args.dbias[int64_t{blockIdx.x} * args.n + own] = sum;
}

template <Activation kKind, typename T>
Status LaunchAs(const LinearBackwardArgs& args, const Launch& launch) {
  const auto start = [&]<int kSize>() {
    constexpr int kColumns = kSize * kWarpSize;
    const dim3 grid(static_cast<unsigned>(args.groups),
                    static_cast<unsigned>((args.n + kColumns - 1) / kColumns));
    linear_backward_kernel<kKind, T, kSize><<<grid, kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  };
  constexpr int kSize = kVectorSize<T>;
  static_assert(kSize * kWarpSize <= kThreads);
  return args.n % kSize == 0 && AreAligned(args.pre, args.dy, args.dpre)
             ? start.template operator()<kSize>()
             : start.template operator()<1>();
}

}  // namespace

Status LinearBackward(const LinearBackwardArgs& args, const Launch& launch) {
  constexpr int64_t kMaxGroups = 0x7fffffff, kMaxColumns = int64_t{kWarpSize} * 65535;
  if (args.groups == 0 || args.n == 0) return {};
  if (args.groups > kMaxGroups || args.n > kMaxColumns)
    return {"linear: at most 2^31 - 1 groups of rows and 2^21 - 32 columns"};
  return DispatchDType(args.dtype, [&]<typename T>() -> Status {
    switch (args.kind) {
      case Activation::kGeluErf:
        return LaunchAs<Activation::kGeluErf, T>(args, launch);
      case Activation::kGeluTanh:
        return LaunchAs<Activation::kGeluTanh, T>(args, launch);
      case Activation::kSilu:
        return LaunchAs<Activation::kSilu, T>(args, launch);
    }
    return {"kind must be kGeluErf, kGeluTanh or kSilu"};
  });
}

}  // namespace zenith
