// Custom-call target of the linear layer with integer weights. Contract:
// ffi/kernels/quantized_linear.h.
//
// Axes: *b batch, k features of x, n of y, g groups of k.
#include "ffi/kernels/quantized_linear.h"

#include "ffi/core/backend.h"
#include "ffi/core/check.h"
#include "ffi/core/target.h"

namespace zenith {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

constexpr const char* kName = "quantized_linear_fwd";

ffi::Error Forward(Context context, Buffer x_buffer, Buffer w_buffer, Buffer scale_buffer,
                   Buffer bias_buffer, Result y_buffer, int64_t n, int32_t transposed) {
  const Operand x("x", x_buffer), w("w", w_buffer), scale("scale", scale_buffer);
  const Operand bias("bias", bias_buffer), y("y", y_buffer);
  Check check(kName);
  check.Float(x);
  check.RankAtLeast(x, 1);
  const bool is_4_bit = w.type() == ffi::DataType::S4;
  if (!is_4_bit) check.Type(w, ffi::DataType::S8);
  check.SameTypeOrF32(scale, x);
  check.SameType(bias, scale);
  const int64_t k = x.dim(-1);
  check.That(n > 0, "n must be positive", n);
  check.That(k > 0, "x must have a last axis of a positive size", k);
  check.Size(w, k * n, "k * n");
  check.That(w.rank() == 1, "w must have rank 1", w.rank());
  check.That(scale.rank() == 1, "scale must have rank 1", scale.rank());
  check.That(scale.size() > 0 && n > 0 && scale.size() % n == 0,
             "scale must have a positive multiple of n elements", scale.size());
  if (check.failed()) return check.error();
  const int64_t groups = scale.size() / n;
  check.That(k % groups == 0, "the number of groups must divide k", groups);
  check.That(!is_4_bit || (transposed == 1 ? k : n) % 2 == 0,
             "rows of 4-bit weights must have an even size", transposed == 1 ? k : n);
  check.That(bias.rank() == 1, "bias must have rank 1", bias.rank());
  if (bias.size() != 0) check.Size(bias, n, "n");
  check.Shape(y, x, x.rank() - 1, {n});
  check.SameType(y, x);
  check.That(transposed == 0 || transposed == 1, "transposed must be 0 or 1", transposed);
  if (check.failed()) return check.error();

  const QuantizedLinearArgs args{.dtype = DTypeOf(x),
                                 .param_dtype = DTypeOf(scale),
                                 .bits = is_4_bit ? 4 : 8,
                                 .transposed = transposed == 1,
                                 .rows = x.leading_size(1),
                                 .k = k,
                                 .n = n,
                                 .groups = groups,
                                 .x = x.data(),
                                 .w = w.data(),
                                 .scale = scale.data(),
                                 .bias = bias.size() != 0 ? bias.data() : nullptr,
                                 .y = y.data()};
  return Run(kName, context, [&](const Launch& launch) { return QuantizedLinear(args, launch); });
}

XLA_FFI_DEFINE_HANDLER(kForward, Forward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b k]
                           .Arg<Buffer>()  // w [k * n]
                           .Arg<Buffer>()  // scale [g * n]
                           .Arg<Buffer>()  // bias [n], or absent [0]
                           .Ret<Buffer>()  // y [*b n]
                           .Attr<int64_t>("n")
                           .Attr<int32_t>("transposed"),
                       kTraits);

}  // namespace

std::span<const Target> QuantizedLinearTargets() {
  static constexpr Target kTargets[] = {{kName, kForward}};
  return kTargets;
}

}  // namespace zenith
