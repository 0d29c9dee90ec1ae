// Contract of the cross-entropy kernels: what a loss needs of each row of logits, without the
// (rows, cols) array of log-probabilities. The loss of label y is lse - picked; label smoothing
// needs total too, a z-loss lse alone.
#pragma once

#include <cstdint>

#include "ffi/kernels/types.h"

namespace zenith {

/// lse[r] = log(sum_c exp(logits[r, c])), picked[r] = logits[r, labels[r]] or 0 where labels[r] is
/// not in [0, cols), total[r] = sum_c logits[r, c]. logits: (rows, cols) dense, `dtype`; labels,
/// lse, picked, total: (rows); results float32. lse of a row that is all -inf is -inf, of one that
/// holds +inf is +inf, of one with a NaN is NaN. Every row has a column. Milakov and Gimelshein
/// 2018, arXiv:1805.02867.
struct CrossEntropyForwardArgs {
  DType dtype;
  int64_t rows, cols;
  const void* logits;
  const int32_t* labels;
  float *lse, *picked, *total;
};
Status CrossEntropyForward(const CrossEntropyForwardArgs& args, const Launch& launch);

/// dlogits[r, c] = dlse[r] * exp(logits[r, c] - lse[r]) + dtotal[r] + (c == labels[r]) *
/// dpicked[r]. dlogits may be logits.
struct CrossEntropyBackwardArgs {
  DType dtype;
  int64_t rows, cols;
  const void* logits;
  const int32_t* labels;
  const float *lse, *dlse, *dpicked, *dtotal;
  void* dlogits;
};
Status CrossEntropyBackward(const CrossEntropyBackwardArgs& args, const Launch& launch);

}  // namespace zenith
