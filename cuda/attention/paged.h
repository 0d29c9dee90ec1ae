// The implementations that cuda/paged_attention.cu chooses among. Each takes the contract's
// arguments.
#pragma once

#include "cuda/core/launch.h"
#include "ffi/kernels/paged_attention.h"

namespace zenith::attention {

/// Any dtype, head size, page size: slow, and the oracle of the other.
Status NaivePaged(const PagedAttentionArgs& args, const Launch& launch);

/// Whether pages of several pools lie as if in one.
inline bool PoolsByPage(const PagedAttentionArgs& p) {
  return p.key_strides.batch == p.pages * p.key_page_stride &&
         p.value_strides.batch == p.pages * p.value_page_stride;
}
/// Whether heads do.
inline bool PoolsByHead(const PagedAttentionArgs& p) {
  return p.key_strides.batch == p.kv_heads * p.key_strides.head &&
         p.value_strides.batch == p.kv_heads * p.value_strides.head;
}

namespace hopper {
/// What FitsPagedDecode (cuda/paged_attention.cu) admits.
Status PagedDecode(const PagedAttentionArgs& args, const Launch& launch);
}  // namespace hopper

}  // namespace zenith::attention
