// Which attention kernel serves which problem.
#include <algorithm>

#include "cuda/attention/kernels.h"

namespace zenith {
namespace {

bool IsAligned(const void* pointer, const HeadStrides& strides) {
  constexpr int64_t kElements = 8;  // 16 bytes, what one cp.async copies
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && strides.batch % kElements == 0 &&
         strides.head % kElements == 0 && strides.length % kElements == 0;
}

/// float16 and bfloat16, head sizes that are multiples of 8 up to 256, 16-byte aligned rows.
bool FitsTensorCores(const AttentionProblem& p, const void* out) {
  const int64_t dim = std::max(p.qk_dim, p.v_dim);
  const bool sizes = p.q_len > 0 && p.kv_len > 0 && p.qk_dim > 0 && p.v_dim > 0 &&
                     p.qk_dim % 8 == 0 && p.v_dim % 8 == 0 && dim <= 256;
  constexpr int64_t kMaxLength = int64_t{1} << 28;  // positions and distances stay in 32 bits
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1, kMinRows = 64;  // grid; tile rows
  const int64_t tiles = (std::max(p.q_len, p.kv_len) + kMinRows - 1) / kMinRows;
  if (p.dtype == DType::kF32 || !sizes || p.q_len > kMaxLength || p.kv_len > kMaxLength ||
      p.batch * p.kv_heads * p.groups > kMaxBlocks / tiles)
    return false;
  if (!IsAligned(p.query, p.query_strides) || !IsAligned(p.key, p.key_strides) ||
      !IsAligned(p.value, p.value_strides) || !IsAligned(out, p.out_strides))
    return false;
  int device = 0, major = 0, shared_bytes = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
             cudaSuccess &&
         major >= 8 && shared_bytes >= attention::SharedBytesLimit(static_cast<int>(dim));
}

bool FitsTensorCores(const AttentionBackwardArgs& a) {
  return FitsTensorCores(a, a.out) && IsAligned(a.dout, a.out_strides) &&
         IsAligned(a.dquery, a.query_strides) && IsAligned(a.dkey, a.key_strides) &&
         IsAligned(a.dvalue, a.value_strides);
}

}  // namespace

Status AttentionForward(const AttentionForwardArgs& args, const Launch& launch) {
  if (args.batch * args.kv_heads * args.groups * args.q_len == 0) return {};
  if (!FitsTensorCores(args, args.out)) return attention::NaiveForward(args, launch);
  const int64_t dim = std::max(args.qk_dim, args.v_dim);
  return dim <= 64    ? attention::ForwardD64(args, launch)
         : dim <= 128 ? attention::ForwardD128(args, launch)
                      : attention::ForwardD256(args, launch);
}

Status AttentionBackward(const AttentionBackwardArgs& args, const Launch& launch) {
  Status status = attention::RowDelta(args, launch);
  if (!status.ok()) return status;
  if (args.batch * args.kv_heads * args.groups == 0 || !FitsTensorCores(args))
    return attention::NaiveBackward(args, launch);
  const int64_t dim = std::max(args.qk_dim, args.v_dim);
  const auto dquery = dim <= 64    ? attention::DqueryD64
                      : dim <= 128 ? attention::DqueryD128
                                   : attention::DqueryD256;
  const auto dkey_dvalue = dim <= 64    ? attention::DkeyDvalueD64
                           : dim <= 128 ? attention::DkeyDvalueD128
                                        : attention::DkeyDvalueD256;
  status = dquery(args, launch);
  if (!status.ok()) return status;
  return dkey_dvalue(args, launch);
}

}  // namespace zenith
