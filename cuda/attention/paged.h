// The implementations that cuda/paged_attention.cu chooses among. Each takes the contract's
// arguments.
#pragma once

#include "cuda/core/launch.h"
#include "ffi/kernels/paged_attention.h"

namespace zenith::attention {

/// Any dtype, head size, page size: slow, and the oracle of the other.
Status NaivePaged(const PagedAttentionArgs& args, const Launch& launch);

namespace hopper {
/// What FitsPagedDecode (cuda/paged_attention.cu) admits.
Status PagedDecode(const PagedAttentionArgs& args, const Launch& launch);
}  // namespace hopper

}  // namespace zenith::attention
