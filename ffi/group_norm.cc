// Custom-call targets of group normalisation and its cotangents. Contract:
// ffi/kernels/group_norm.h.
//
// Axes: *b samples, r rows, g groups, k channels of a group, d = g * k. The attribute channels_last
// says in which order x has them, r g k or, for the targets named _first_, g k r. silu: whether it
// follows. eps.
#include "ffi/kernels/group_norm.h"

#include "ffi/core/backend.h"
#include "ffi/core/check.h"
#include "ffi/core/target.h"

namespace zenith {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

GroupNormShape ShapeOf(const Operand& x, int32_t channels_last) {
  const bool last = channels_last == 1;
  return {.channels_last = last,
          .samples = x.leading_size(3),
          .rows = x.dim(last ? -3 : -1),
          .groups = x.dim(last ? -2 : -3),
          .channels = x.dim(last ? -1 : -2)};
}

/// What both targets are given alike.
void CheckShared(Check& check, const Operand& x, const Operand& scale, const Operand& bias,
                 const Operand& mean, const Operand& rstd, int32_t channels_last, int32_t silu) {
  const GroupNormShape shape = ShapeOf(x, channels_last);
  check.Float(x);
  check.RankAtLeast(x, 3);
  check.SameTypeOrF32(scale, x);
  check.Shape(scale, x, 0, {shape.width()});
  check.Same(bias, scale);
  check.Type(mean, ffi::DataType::F32);
  check.Shape(mean, x, x.rank() - 3, {shape.groups});
  check.Same(rstd, mean);
  check.That(channels_last == 0 || channels_last == 1, "channels_last must be 0 or 1",
             channels_last);
  check.That(silu == 0 || silu == 1, "silu must be 0 or 1", silu);
}

ffi::Error Forward(Context context, Buffer x_buffer, Buffer scale_buffer, Buffer bias_buffer,
                   Result y_result, Result mean_result, Result rstd_result, int32_t channels_last,
                   int32_t silu, float eps) {
  const char* const target = channels_last == 0 ? "group_norm_first_fwd" : "group_norm_fwd";
  const Operand x("x", x_buffer), scale("scale", scale_buffer), bias("bias", bias_buffer);
  const Operand y("y", y_result), mean("mean", mean_result), rstd("rstd", rstd_result);
  Check check(target);
  CheckShared(check, x, scale, bias, mean, rstd, channels_last, silu);
  check.Same(y, x);
  if (check.failed()) return check.error();

  const GroupNormForwardArgs args{.shape = ShapeOf(x, channels_last),
                                  .dtype = DTypeOf(x),
                                  .param_dtype = DTypeOf(scale),
                                  .silu = silu == 1,
                                  .eps = eps,
                                  .x = x.data(),
                                  .scale = scale.data(),
                                  .bias = bias.data(),
                                  .y = y.data(),
                                  .mean = mean.data<float>(),
                                  .rstd = rstd.data<float>()};
  return Run(target, context, [&](const Launch& launch) { return GroupNormForward(args, launch); });
}

XLA_FFI_DEFINE_HANDLER(kForward, Forward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b r g k] or [*b g k r]
                           .Arg<Buffer>()  // scale [d]
                           .Arg<Buffer>()  // bias [d]
                           .Ret<Buffer>()  // y, as x
                           .Ret<Buffer>()  // mean [*b g], float32
                           .Ret<Buffer>()  // rstd [*b g], float32
                           .Attr<int32_t>("channels_last")
                           .Attr<int32_t>("silu")
                           .Attr<float>("eps"),
                       kTraits);

ffi::Error Backward(Context context, Buffer x_buffer, Buffer scale_buffer, Buffer bias_buffer,
                    Buffer dy_buffer, Buffer mean_buffer, Buffer rstd_buffer, Result dx_result,
                    Result dscale_result, Result dbias_result, int32_t channels_last,
                    int32_t silu) {
  const char* const target = channels_last == 0 ? "group_norm_first_bwd" : "group_norm_bwd";
  const Operand x("x", x_buffer), scale("scale", scale_buffer), bias("bias", bias_buffer);
  const Operand dy("dy", dy_buffer), mean("mean", mean_buffer), rstd("rstd", rstd_buffer);
  const Operand dx("dx", dx_result), dscale("dscale", dscale_result), dbias("dbias", dbias_result);
  Check check(target);
  CheckShared(check, x, scale, bias, mean, rstd, channels_last, silu);
  check.Same(dy, x);
  check.Same(dx, x);
  check.Type(dscale, ffi::DataType::F32);
  check.Shape(dscale, x, x.rank() - 3, {ShapeOf(x, channels_last).width()});
  check.Same(dbias, dscale);
  if (check.failed()) return check.error();

  const GroupNormBackwardArgs args{.shape = ShapeOf(x, channels_last),
                                   .dtype = DTypeOf(x),
                                   .param_dtype = DTypeOf(scale),
                                   .silu = silu == 1,
                                   .x = x.data(),
                                   .scale = scale.data(),
                                   .bias = bias.data(),
                                   .dy = dy.data(),
                                   .mean = mean.data<float>(),
                                   .rstd = rstd.data<float>(),
                                   .dx = dx.data(),
                                   .dscale = dscale.data<float>(),
                                   .dbias = dbias.data<float>()};
  return Run(target, context,
             [&](const Launch& launch) { return GroupNormBackward(args, launch); });
}

XLA_FFI_DEFINE_HANDLER(kBackward, Backward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b r g k] or [*b g k r]
                           .Arg<Buffer>()  // scale [d]
                           .Arg<Buffer>()  // bias [d]
                           .Arg<Buffer>()  // dy, as x
                           .Arg<Buffer>()  // mean [*b g], float32
                           .Arg<Buffer>()  // rstd [*b g], float32
                           .Ret<Buffer>()  // dx, as x
                           .Ret<Buffer>()  // dscale [*b d], float32
                           .Ret<Buffer>()  // dbias [*b d], float32
                           .Attr<int32_t>("channels_last")
                           .Attr<int32_t>("silu"),
                       kTraits);

}  // namespace

std::span<const Target> GroupNormTargets() {
  static constexpr Target kTargets[] = {{"group_norm_fwd", kForward},
                                        {"group_norm_bwd", kBackward},
                                        {"group_norm_first_fwd", kForward},
                                        {"group_norm_first_bwd", kBackward}};
  return kTargets;
}

}  // namespace zenith
