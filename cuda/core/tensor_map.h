// Tensor maps: what the copy engine of Hopper (cuda/core/tma.cuh) has to know of a tensor.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/core/launch.h"

namespace zenith {

/// A (batch, head, length, feature) tensor of 16-bit elements; strides in elements, multiples of 8,
/// that of the features is 1. `base` is 16-byte aligned.
struct HeadTensor {
  DType dtype;
  const void* base;
  int64_t batch, heads, length, features;
  int64_t batch_stride, head_stride, length_stride;
};

inline constexpr int kBoxFeatures = 64;  // 128 bytes, a row of the widest swizzle

/// A map that copies boxes of `rows` (up to 256) positions x `box_features` features of one head,
/// with the swizzle of 128 bytes that wgmma reads (cuda/core/wgmma.cuh), of 64 bytes for 32
/// features, and none for fewer.
Status MakeTensorMap(const HeadTensor& tensor, int rows, CUtensorMap& map,
                     int box_features = kBoxFeatures);

}  // namespace zenith
