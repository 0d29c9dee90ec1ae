// Contract of the linear layer: a matrix product with what follows it in its epilogue.
#pragma once

#include <cstdint>

#include "ffi/kernels/activation.h"
#include "ffi/kernels/types.h"

namespace zenith {

/// What is applied to the product plus bias. Python's codes are in zenith_jax/ops/linear.py.
enum class Epilogue : int32_t {
  kNone = 0,
  kRelu = 1,         // max(x, 0), NaN stays
  kReluSquared = 2,  // max(x, 0)^2
  kTanh = 3,
  kSilu = 4,  // the last three: ffi/kernels/activation.h
  kGeluTanh = 5,
  kGeluErf = 6,
};

/// How the weights lie, in float32 or narrower. Python's codes are in zenith_jax/ops/linear.py.
enum class WeightLayout : int32_t {
  kRows = 0,     // (k, n)
  kColumns = 1,  // (n, k)
  kPanels = 2,   // (n / kPanelColumns, k, kPanelColumns): CPU only, n a multiple of kPanelColumns
};
inline constexpr int64_t kPanelColumns = 64;  // PANEL in zenith_jax/ops/linear.py

/// y = epilogue(x w + bias) + residual, and pre = x w + bias; float32 inside, each rounded once.
/// x: (rows, k), y, pre, residual: (rows, n), w: k x n in its layout; row-major, `dtype`. bias:
/// (n,), `bias_dtype`: `dtype` or float32. residual and pre may be null. k > 0.
/// Results alias no operand. CUDA: float16 and bfloat16; k and n are multiples of 8. CPU: float32.
/// kGeluErf and kGeluTanh give NaN for -inf, as JAX's formulas do.
struct LinearForwardArgs {
  Epilogue epilogue;
  DType dtype, bias_dtype;
  WeightLayout layout;
  int64_t rows, k, n;
  const void *x, *w, *bias, *residual;
  void *y, *pre;
};
Status LinearForward(const LinearForwardArgs& args, const Launch& launch);

/// y = f(x w_gate) * (x w_value), with f `epilogue`, one of kSilu, kGeluTanh and kGeluErf; GPUs
/// only, as LinearForward otherwise. w_gate, w_value: (k, n), or (n, k) if `transposed`. gate and
/// value, both or neither null: the two products, (rows, n), as results.
struct GatedLinearForwardArgs {
  Epilogue epilogue;
  DType dtype;
  bool transposed;
  int64_t rows, k, n;
  const void *x, *w_gate, *w_value;
  void *y, *gate, *value;
};
Status GatedLinearForward(const GatedLinearForwardArgs& args, const Launch& launch);

/// What comes before the two products of the backward pass: with dy the cotangent of y,
///   dpre = dy * f'(pre);  dbias[group] = the sum of dpre over the group's rows, in float32
/// pre, dy, dpre: (groups, rows_per_group, n), `dtype`. dbias: (groups, n), float32; the caller
/// sums over groups. Results alias no operand. CUDA: n up to 2^21 - 32.
struct LinearBackwardArgs {
  Activation kind;
  DType dtype;
  int64_t groups, rows_per_group, n;
  const void *pre, *dy;
  void* dpre;
  float* dbias;
};
Status LinearBackward(const LinearBackwardArgs& args, const Launch& launch);

}  // namespace zenith
