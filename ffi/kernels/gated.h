// Contract of the gated activation kernels, the same for every back end: the elementwise part of a
// gated linear unit. Shazeer 2020, arXiv:2002.05202.
#pragma once

#include <cstdint>

#include "ffi/kernels/activation.h"

namespace zenith {

/// Rows of `cols` elements, `stride` elements from row to row: the gate and the value of a gated
/// unit may be the halves of one array. `stride` >= `cols`.
///
/// y = f(gate) * value. y: (rows, cols) dense. All of `dtype`; float32 inside, one rounding.
struct GatedForwardArgs {
  Activation kind;
  DType dtype;
  int64_t rows, cols;
  int64_t stride;
  const void *gate, *value;
  void* y;
};
Status GatedForward(const GatedForwardArgs& args, const Launch& launch);

/// dgate = dy * value * f'(gate), dvalue = dy * f(gate), in rows of `stride` too. dy is dense.
struct GatedBackwardArgs {
  Activation kind;
  DType dtype;
  int64_t rows, cols;
  int64_t stride;
  const void *gate, *value, *dy;
  void *dgate, *dvalue;
};
Status GatedBackward(const GatedBackwardArgs& args, const Launch& launch);

}  // namespace zenith
