// Which attention kernel serves which problem.
#include <algorithm>

#include "cuda/attention/kernels.h"
#include "cuda/attention/problem.cuh"
#include "cuda/core/device.h"

namespace zenith {
namespace {

int64_t ElementBytes(const AttentionProblem& p) { return p.dtype == DType::kF32 ? 4 : 2; }

int64_t HeadDim(const AttentionProblem& p) { return std::max(p.qk_dim, p.v_dim); }

/// Rows that start and end at multiples of 16 bytes, head sizes up to 256.
bool FitsTensorCores(const AttentionProblem& p, const void* out) {
  constexpr int64_t kMaxLength = int64_t{1} << 28;  // positions and distances stay in 32 bits
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1, kMinRows = 32;  // of a grid; of a tile
  const int64_t bytes = ElementBytes(p), length = std::max(p.q_len, p.kv_len);
  if (p.q_len == 0 || p.kv_len == 0 || p.qk_dim == 0 || p.v_dim == 0 || HeadDim(p) > 256 ||
      p.qk_dim * bytes % 16 != 0 || p.v_dim * bytes % 16 != 0 || length > kMaxLength ||
      p.batch * p.kv_heads * p.groups > kMaxBlocks / ((length + kMinRows - 1) / kMinRows))
    return false;
  if (!attention::HasAlignedRows(p.query, p.query_strides, bytes) ||
      !attention::HasAlignedRows(p.key, p.key_strides, bytes) ||
      !attention::HasAlignedRows(p.value, p.value_strides, bytes) ||
      !attention::HasAlignedRows(out, p.out_strides, bytes))
    return false;
  int device = 0, major = 0, shared_bytes = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
             cudaSuccess &&
         major >= 8 && shared_bytes >= attention::SharedBytesLimit(static_cast<int>(HeadDim(p)));
}

bool FitsTensorCores(const AttentionBackwardArgs& a) {
  const int64_t bytes = ElementBytes(a);
  return FitsTensorCores(a, a.out) && attention::HasAlignedRows(a.dout, a.out_strides, bytes) &&
         attention::HasAlignedRows(a.dquery, a.query_strides, bytes) &&
         attention::HasAlignedRows(a.dkey, a.key_strides, bytes) &&
         attention::HasAlignedRows(a.dvalue, a.value_strides, bytes);
}

#ifdef ZENITH_HOPPER  // the module holds code for sm_90a
/// Whether the kernels for Hopper take a problem that FitsTensorCores.
bool FitsHopper(const AttentionProblem& p) {
  return p.dtype != DType::kF32 && !attention::IsModified(p) && !attention::MayHaveDeadRows(p) &&
         ChoosesHopper();
}
/// And those that look at each score.
bool FitsHopperModified(const AttentionProblem& p) {
  return p.dtype != DType::kF32 && !(p.softcap > 0) && HeadDim(p) <= 128 && ChoosesHopper();
}

/// Decoding: so few queries that the time is that of reading keys and values. With fewer keys it
/// has not been measured.
bool FitsDecode(const AttentionProblem& p) {
  constexpr int64_t kMaxQueries = 16, kMaxRows = 64;  // rows: of the heads that share keys
  constexpr int64_t kMinKeys = 256, kMaxGrid = 65535;
  return p.dtype != DType::kF32 && p.q_len <= kMaxQueries && p.q_len * p.groups <= kMaxRows &&
         p.kv_len >= kMinKeys && p.batch <= kMaxGrid && p.kv_heads * 4 <= kMaxGrid &&
         ChoosesHopper();
}

/// Short problems are a tile or less of the kernels for Hopper, and the older ones' tiles are
/// smaller: b64 h12 d64 takes 19.5 us forward and 49 backward against 18.1 and 22.6 at length 32;
/// b32 h12 11.1 and 44 against 16.0 and 38 at 128 (H200, bfloat16, 11/2026).
int64_t Length(const AttentionProblem& p) { return std::max(p.q_len, p.kv_len); }

bool FitsHeads(const AttentionProblem& p, int64_t qk_dim, int64_t v_dim) {
  return p.qk_dim <= qk_dim && p.v_dim <= v_dim;
}

Status HopperForward(const AttentionForwardArgs& args, const Launch& launch) {
  using namespace attention::hopper;
  const auto kernel = FitsHeads(args, 64, 64)     ? ForwardD64
                      : FitsHeads(args, 96, 96)   ? ForwardD96
                      : FitsHeads(args, 128, 128) ? ForwardD128
                      : FitsHeads(args, 192, 128) ? ForwardD192V128
                      : FitsHeads(args, 192, 192) ? ForwardD192
                                                  : ForwardD256;
  return kernel(args, launch);
}

/// Expects `delta` filled.
Status HopperBackward(const AttentionBackwardArgs& args, const Launch& launch) {
  using namespace attention::hopper;
  const auto run = [&](auto dquery, auto dkey_dvalue) {
    const Status status = dquery(args, launch);
    return status.ok() ? dkey_dvalue(args, launch) : status;
  };
  return FitsHeads(args, 64, 64)     ? run(DqueryD64, DkeyDvalueD64)
         : FitsHeads(args, 96, 96)   ? run(DqueryD96, DkeyDvalueD96)
         : FitsHeads(args, 128, 128) ? run(DqueryD128, DkeyDvalueD128)
         : FitsHeads(args, 192, 128) ? run(DqueryD192V128, DkeyDvalueD192V128)
                                     : run(DqueryD256, DkeyDvalueD256);
}
#endif

/// The kernel for a problem that fits: float32's, or the smallest tile that holds the head.
template <typename Kernel>
Kernel* Pick(const AttentionProblem& p, Kernel* d64, Kernel* d128, Kernel* d256, Kernel* f32,
             Kernel* tf32) {
  if (p.dtype == DType::kF32) return p.allow_tf32 ? tf32 : f32;
  return HeadDim(p) <= 64 ? d64 : HeadDim(p) <= 128 ? d128 : d256;
}

auto PickDquery(const AttentionProblem& p) {
  using namespace attention;
  return Pick(p, DqueryD64, DqueryD128, DqueryD256, DqueryF32, DqueryTf32);
}

}  // namespace

Status AttentionForward(const AttentionForwardArgs& args, const Launch& launch) {
  using namespace attention;
  if (args.batch * args.kv_heads * args.groups * args.q_len == 0) return {};
  if (!FitsTensorCores(args, args.out)) return NaiveForward(args, launch);
#ifdef ZENITH_HOPPER
  if (FitsDecode(args)) return hopper::Decode(args, launch);
  if (FitsHopper(args) && Length(args) >= 64) return HopperForward(args, launch);
  if (FitsHopperModified(args) && Length(args) > 128) {
    Status status = hopper::MakeMaskTiles(args, false, launch);
    const auto kernel = hopper::MasksAlone(args)  ? hopper::ForwardMasked
                        : hopper::BiasAlone(args) ? hopper::ForwardBias
                                                  : hopper::ForwardModified;
    if (status.ok()) status = kernel(args, launch);
    return status.ok() && MayHaveDeadRows(args) ? ForwardDeadRows(args, launch) : status;
  }
#endif
  return Pick(args, ForwardD64, ForwardD128, ForwardD256, ForwardF32, ForwardTf32)(args, launch);
}

Status AttentionBackward(const AttentionBackwardArgs& args, const Launch& launch) {
  using namespace attention;
  Status status = RowDelta(args, launch);
  if (!status.ok()) return status;
  if (args.batch * args.kv_heads * args.groups == 0 || !FitsTensorCores(args))
    return NaiveBackward(args, launch);
#ifdef ZENITH_HOPPER
  if (FitsHopper(args) && (Length(args) > 128 || HeadDim(args) > 128))
    return HopperBackward(args, launch);
  if (FitsHopperModified(args) && Length(args) > 128) {
    status = hopper::MakeMaskTiles(args, true, launch);
    const bool masked = hopper::MasksAlone(args);
    const auto dquery = args.dbias ? PickDquery(args)
                        : masked   ? hopper::DqueryMasked
                                   : hopper::DqueryModified;
    if (status.ok()) status = dquery(args, launch);
    if (status.ok())
      status = (masked ? hopper::DkeyDvalueMasked : hopper::DkeyDvalueModified)(args, launch);
    return status.ok() && MayHaveDeadRows(args) ? BackwardDeadRows(args, !args.dbias, launch)
                                                : status;
  }
#endif
  const auto dquery = PickDquery(args);
  status = dquery(args, launch);
  if (status.ok() && args.dbias && args.softcap > 0) {  // that was dbias alone
    AttentionBackwardArgs without_dbias = args;
    without_dbias.dbias = nullptr;
    status = dquery(without_dbias, launch);
  }
  if (!status.ok()) return status;
  return Pick(args, DkeyDvalueD64, DkeyDvalueD128, DkeyDvalueD256, DkeyDvalueF32, DkeyDvalueTf32)(
      args, launch);
}

}  // namespace zenith
