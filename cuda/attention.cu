// Which attention kernel serves which problem.
#include <algorithm>

#include "cuda/attention/kernels.h"

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

/// The kernel for a problem that fits: float32's, or the smallest tile that holds the head.
template <typename Kernel>
Kernel* Pick(const AttentionProblem& p, Kernel* d64, Kernel* d128, Kernel* d256, Kernel* f32) {
  if (p.dtype == DType::kF32) return f32;
  return HeadDim(p) <= 64 ? d64 : HeadDim(p) <= 128 ? d128 : d256;
}

}  // namespace

Status AttentionForward(const AttentionForwardArgs& args, const Launch& launch) {
  using namespace attention;
  if (args.batch * args.kv_heads * args.groups * args.q_len == 0) return {};
  if (!FitsTensorCores(args, args.out)) return NaiveForward(args, launch);
  return Pick(args, ForwardD64, ForwardD128, ForwardD256, ForwardF32)(args, launch);
}

Status AttentionBackward(const AttentionBackwardArgs& args, const Launch& launch) {
  using namespace attention;
  Status status = RowDelta(args, launch);
  if (!status.ok()) return status;
  if (args.batch * args.kv_heads * args.groups == 0 || !FitsTensorCores(args))
    return NaiveBackward(args, launch);
  status = Pick(args, DqueryD64, DqueryD128, DqueryD256, DqueryF32)(args, launch);
  if (!status.ok()) return status;
  return Pick(args, DkeyDvalueD64, DkeyDvalueD128, DkeyDvalueD256, DkeyDvalueF32)(args, launch);
}

}  // namespace zenith
