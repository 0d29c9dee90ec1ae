// Tensor maps of matrices, for cuda/core/tma_matrix.cuh.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/core/launch.h"

namespace zenith {

/// Row-major, of elements of 1 or 2 bytes. `base` is 16-byte aligned, a row's bytes are a multiple
/// of 16.
struct Matrix {
  const void* base;
  int element_bytes;
  int64_t rows, columns;
};

/// A map that copies boxes of `box_rows` x `box_columns`; `swizzled` by as many bytes as a row of
/// the box has, 64 or 128. `promoted`: the second-level cache fetches 256 bytes where one is
/// missing.
Status MakeMatrixMap(const Matrix& matrix, int box_rows, int box_columns, bool swizzled,
                     bool promoted, CUtensorMap& map);

}  // namespace zenith
