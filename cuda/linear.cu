// Which linear kernel serves which problem.
#include "cuda/core/device.h"
#include "cuda/core/vector.cuh"
#include "cuda/linear/kernels.h"

namespace zenith {
namespace {

/// Of both layers. pointers: what must lie at multiples of 16 bytes.
template <typename Args, typename... Pointers>
Status Forward(const Args& args, const Launch& launch, Pointers... pointers) {
  constexpr int64_t kAligned = 8, kMaxSize = int64_t{1} << 24;  // tiles stay in 32 bits
  if (args.rows == 0 || args.n == 0) return {};
  if (args.k <= 0 || args.k % kAligned != 0 || args.n % kAligned != 0)
    return {"linear: k and n must be multiples of 8, and k not 0"};
  if (args.rows > 64 * kMaxSize || args.k > kMaxSize || args.n > kMaxSize)
    return {"linear: k and n must be at most 2^24, rows at most 2^30"};
  if (!AreAligned(pointers...)) return {"linear: arrays must be 16-byte aligned"};
#ifdef ZENITH_HOPPER  // the module holds code for sm_90a
  if (IsHopper()) {
    if (args.dtype == DType::kF16) return linear::HopperF16(args, launch);
    if (args.dtype == DType::kBF16) return linear::HopperBF16(args, launch);
    return {"linear: dtype must be float16 or bfloat16"};
  }
#endif
  (void)launch;
  return {"linear: the kernel needs a GPU of compute capability 9.0"};
}

}  // namespace

Status LinearForward(const LinearForwardArgs& a, const Launch& launch) {
  if (a.layout == WeightLayout::kPanels) return {"linear: weights in panels are for the CPU"};
  return Forward(a, launch, a.x, a.w, a.residual, a.y, a.pre);
}

Status GatedLinearForward(const GatedLinearForwardArgs& a, const Launch& launch) {
  if (a.epilogue != Epilogue::kSilu && a.epilogue != Epilogue::kGeluTanh &&
      a.epilogue != Epilogue::kGeluErf)
    return {"linear: a gate's epilogue must be kSilu, kGeluTanh or kGeluErf"};
  return Forward(a, launch, a.x, a.w_gate, a.w_value, a.y, a.gate, a.value);
}

}  // namespace zenith
