// Which kernel serves which problem of attention over pages.
#include <algorithm>
#include <bit>

#include "cuda/attention/kernels.h"
#include "cuda/attention/paged.h"
#include "cuda/core/device.h"
#include "ffi/kernels/paged_attention.h"

namespace zenith {
namespace {

#ifdef ZENITH_HOPPER  // the module holds code for sm_90a
/// Decoding: pages of a power of two of keys, 16 at least, so that the 16 keys of a product are in
/// one; 16-bit types, rows at multiples of 16 bytes; pools dense, so that a tensor map can name
/// all. `unsupported` of zenith_jax/ops/paged_attention.py.
bool FitsPagedDecode(const PagedAttentionArgs& p) {
  constexpr int64_t kMaxQueries = 16, kMaxRows = 64;  // rows: of the heads that share keys
  constexpr int64_t kMinPage = 16, kMaxLength = int64_t{1} << 28, kMaxGrid = 65535;
  const auto aligned = [](const void* data, const HeadStrides& strides, int64_t page) {
    return attention::HasAlignedRows(data, strides, 2) && page * 2 % 16 == 0;
  };
  return p.dtype != DType::kF32 && p.q_len <= kMaxQueries && p.q_len * p.groups <= kMaxRows &&
         p.page_size >= kMinPage && std::has_single_bit(static_cast<uint64_t>(p.page_size)) &&
         p.kv_len > 0 && p.kv_len <= kMaxLength && p.batch <= kMaxGrid &&
         p.kv_heads * 4 <= kMaxGrid && p.qk_dim > 0 && p.v_dim > 0 && p.qk_dim % 8 == 0 &&
         p.v_dim % 8 == 0 &&
         (p.batch == p.sequences || attention::PoolsByPage(p) || attention::PoolsByHead(p)) &&
         std::max(p.qk_dim, p.v_dim) <= 256 && aligned(p.query, p.query_strides, 0) &&
         aligned(p.out, p.out_strides, 0) && aligned(p.key, p.key_strides, p.key_page_stride) &&
         aligned(p.value, p.value_strides, p.value_page_stride) && ChoosesHopper();
}
#endif

}  // namespace

Status PagedAttention(const PagedAttentionArgs& args, const Launch& launch) {
  if (args.batch * args.kv_heads * args.groups * args.q_len == 0) return {};
#ifdef ZENITH_HOPPER
  if (FitsPagedDecode(args)) return attention::hopper::PagedDecode(args, launch);
#endif
  return attention::NaivePaged(args, launch);
}

}  // namespace zenith
