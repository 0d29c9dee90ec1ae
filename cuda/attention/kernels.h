// The implementations that cuda/attention.cu chooses among. Each takes the contract's arguments.
#pragma once

#include "cuda/core/launch.h"
#include "ffi/kernels/attention.h"

namespace zenith::attention {

/// Any dtype, any head size, any stride: slow, and the oracle of the others.
Status NaiveForward(const AttentionForwardArgs& args, const Launch& launch);
/// Expects `delta` filled.
Status NaiveBackward(const AttentionBackwardArgs& args, const Launch& launch);

/// delta[b,h,t] = sum_e dout * out - dlse, any dtype.
Status RowDelta(const AttentionBackwardArgs& args, const Launch& launch);

/// What rows without an allowed key give, after kernels that leave them out; head sizes up to 256.
Status ForwardDeadRows(const AttentionForwardArgs& args, const Launch& launch);
/// with_dquery: dquery too comes from such a kernel.
Status BackwardDeadRows(const AttentionBackwardArgs& args, bool with_dquery, const Launch& launch);

/// Tensor cores, for the problems that FitsTensorCores (cuda/attention.cu) admits. The name says
/// the largest of qk_dim and v_dim that the tile takes, for float16 and bfloat16; F32 takes all, in
/// three tf32 products for one of float32, and Tf32 all, in one.
Status ForwardD64(const AttentionForwardArgs& args, const Launch& launch);
Status ForwardD128(const AttentionForwardArgs& args, const Launch& launch);
Status ForwardD256(const AttentionForwardArgs& args, const Launch& launch);
Status ForwardF32(const AttentionForwardArgs& args, const Launch& launch);
Status ForwardTf32(const AttentionForwardArgs& args, const Launch& launch);
/// dquery, and dbias if wanted; where there is a softcap too, dbias alone. These and the following
/// expect `delta` filled.
Status DqueryD64(const AttentionBackwardArgs& args, const Launch& launch);
Status DqueryD128(const AttentionBackwardArgs& args, const Launch& launch);
Status DqueryD256(const AttentionBackwardArgs& args, const Launch& launch);
Status DqueryF32(const AttentionBackwardArgs& args, const Launch& launch);
Status DqueryTf32(const AttentionBackwardArgs& args, const Launch& launch);
Status DkeyDvalueD64(const AttentionBackwardArgs& args, const Launch& launch);
Status DkeyDvalueD128(const AttentionBackwardArgs& args, const Launch& launch);
Status DkeyDvalueD256(const AttentionBackwardArgs& args, const Launch& launch);
Status DkeyDvalueF32(const AttentionBackwardArgs& args, const Launch& launch);
Status DkeyDvalueTf32(const AttentionBackwardArgs& args, const Launch& launch);

/// wgmma and TMA: compute capability 9.0 alone, in a module with code for sm_90a. Float16 and
/// bfloat16. The name says the largest head size, of query and key and, where it is another, of
/// value; these take problems that are not IsModified and have a key for every query.
namespace hopper {
/// Few queries, of any problem of those types: masks, biases, rows without a key and all.
Status Decode(const AttentionForwardArgs& args, const Launch& launch);
/// What Masked and Modified kernels want of mask, interval and segments, into the scratch if that
/// is large enough (mask_tiles.cuh). `by_key`: for dkey and dvalue too.
Status MakeMaskTiles(const AttentionProblem& problem, bool by_key, const Launch& launch);
/// Whether nothing but these is special, and the scratch is large enough: then Masked kernels
/// serve, for head sizes up to 128. Rows without an allowed key are left to DeadRows.
bool MasksAlone(const AttentionProblem& problem);
Status ForwardMasked(const AttentionForwardArgs& args, const Launch& launch);
Status DqueryMasked(const AttentionBackwardArgs& args, const Launch& launch);
Status DkeyDvalueMasked(const AttentionBackwardArgs& args, const Launch& launch);
/// Whether nothing but a bias is special, which can be copied in tiles, and every query has a key
/// in the band: then ForwardBias serves, for head sizes up to 128. Rows of -inf are left to
/// DeadRows.
bool BiasAlone(const AttentionProblem& problem);
Status ForwardBias(const AttentionForwardArgs& args, const Launch& launch);
/// Head sizes up to 128 and what the following do not take, but for a softcap and dbias. Rows
/// without an allowed key are left to DeadRows.
Status ForwardModified(const AttentionForwardArgs& args, const Launch& launch);
Status DqueryModified(const AttentionBackwardArgs& args, const Launch& launch);
Status DkeyDvalueModified(const AttentionBackwardArgs& args, const Launch& launch);
Status ForwardD64(const AttentionForwardArgs& args, const Launch& launch);
Status ForwardD96(const AttentionForwardArgs& args, const Launch& launch);
Status ForwardD128(const AttentionForwardArgs& args, const Launch& launch);
Status ForwardD192V128(const AttentionForwardArgs& args, const Launch& launch);
Status ForwardD192(const AttentionForwardArgs& args, const Launch& launch);
Status ForwardD256(const AttentionForwardArgs& args, const Launch& launch);
Status DqueryD64(const AttentionBackwardArgs& args, const Launch& launch);
Status DqueryD96(const AttentionBackwardArgs& args, const Launch& launch);
Status DqueryD128(const AttentionBackwardArgs& args, const Launch& launch);
Status DqueryD192V128(const AttentionBackwardArgs& args, const Launch& launch);
Status DqueryD256(const AttentionBackwardArgs& args, const Launch& launch);
Status DkeyDvalueD64(const AttentionBackwardArgs& args, const Launch& launch);
Status DkeyDvalueD96(const AttentionBackwardArgs& args, const Launch& launch);
Status DkeyDvalueD128(const AttentionBackwardArgs& args, const Launch& launch);
Status DkeyDvalueD192V128(const AttentionBackwardArgs& args, const Launch& launch);
Status DkeyDvalueD256(const AttentionBackwardArgs& args, const Launch& launch);
}  // namespace hopper

/// Shared memory that the tensor core kernels may ask for: up to 128 features what every device of
/// compute capability 8.0 or newer grants a block, above that what 8.0 and 9.0 grant (8.6, 8.9 and
/// 12.0 do not). CUDA C++ Programming Guide, technical specifications per compute capability.
constexpr int SharedBytesLimit(int dim) { return (dim <= 128 ? 99 : 163) * 1024; }

/// Whether every row starts at a multiple of 16 bytes, for elements of `element_bytes` bytes.
inline bool HasAlignedRows(const void* pointer, const HeadStrides& strides, int64_t element_bytes) {
  const int64_t bits = (strides.batch | strides.head | strides.length) * element_bytes;
  return ((reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(bits)) & 15) == 0;
}

}  // namespace zenith::attention
