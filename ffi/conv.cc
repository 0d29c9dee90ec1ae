// Custom-call target of the convolution. Contract: ffi/kernels/conv.h.
//
// Axes: *b images, h w height and width of x, c channels, p q height and width of y, n features.
#include "ffi/kernels/conv.h"

#include "ffi/core/backend.h"
#include "ffi/core/check.h"
#include "ffi/core/target.h"

namespace zenith {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;
using Pair = ffi::Span<const int64_t>;  // of the vertical and the horizontal axis

ConvAxis Axis(size_t i, const Operand& x, const Operand& y, Pair kernel, Pair strides,
              Pair dilation, Pair before, Pair pool) {
  const auto axis = static_cast<int64_t>(i) - 3;
  return {x.dim(axis), y.dim(axis) * pool[i], kernel[i], strides[i], dilation[i], before[i],
          pool[i]};
}

ffi::Error Forward(Context context, Buffer x_buffer, Buffer w_buffer, Buffer scale_buffer,
                   Buffer bias_buffer, Buffer residual_buffer, Result y_buffer, Pair kernel,
                   Pair strides, Pair dilation, Pair before, Pair pool, int32_t relu) {
  constexpr const char* kTarget = "conv_fwd";
  const Operand x("x", x_buffer), w("w", w_buffer), scale("scale", scale_buffer),
      bias("bias", bias_buffer), residual("residual", residual_buffer), y("y", y_buffer);
  Check check(kTarget);
  for (const Operand& operand : {x, w, scale, bias, residual, y}) {
    check.Type(operand, ffi::DataType::F32);
  }
  for (const Pair& pair : {kernel, strides, dilation, before, pool}) {
    check.That(pair.size() == 2, "an attribute must have 2 elements",
               static_cast<int64_t>(pair.size()));
  }
  check.RankAtLeast(x, 3);
  if (check.failed()) return check.error();

  const ConvAxis height = Axis(0, x, y, kernel, strides, dilation, before, pool),
                 width = Axis(1, x, y, kernel, strides, dilation, before, pool);
  for (const ConvAxis& axis : {height, width}) {
    check.That(axis.kernel > 0, "kernel must be positive", axis.kernel);
    check.That(axis.stride > 0, "strides must be positive", axis.stride);
    check.That(axis.dilation > 0, "dilation must be positive", axis.dilation);
    check.That(axis.pool > 0, "pool must be positive", axis.pool);
  }
  const int64_t channels = x.dim(-1), features = bias.dim(-1);
  check.That(channels > 0, "x must have channels", channels);
  check.That(w.rank() == 1, "w must have rank 1", w.rank());
  check.Size(w, height.kernel * width.kernel * channels * features, "the filter's size");
  check.That(bias.rank() == 1, "bias must have rank 1", bias.rank());
  const bool has_scale = scale.size() != 0, has_residual = residual.size() != 0;
  if (has_scale) check.Same(scale, bias);
  check.Shape(y, x, x.rank() - 3, {y.dim(-3), y.dim(-2), features});
  if (has_residual) {
    check.Same(residual, y);
    check.That(height.pool * width.pool == 1, "with a residual there is no maximum, pool must be 1",
               height.pool * width.pool);
  }
  check.That(relu == 0 || relu == 1, "relu must be 0 or 1", relu);
  if (check.failed()) return check.error();

  const ConvForwardArgs args{.relu = relu == 1,
                             .images = x.leading_size(3),
                             .channels = channels,
                             .features = features,
                             .height = height,
                             .width = width,
                             .x = x.data<float>(),
                             .w = w.data<float>(),
                             .scale = has_scale ? scale.data<float>() : nullptr,
                             .bias = bias.data<float>(),
                             .residual = has_residual ? residual.data<float>() : nullptr,
                             .y = y.data<float>()};
  return Run(kTarget, context, [&](const Launch& launch) { return ConvForward(args, launch); });
}

XLA_FFI_DEFINE_HANDLER(kForward, Forward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b h w c]
                           .Arg<Buffer>()  // w [kernel[0] * kernel[1] * c * n]
                           .Arg<Buffer>()  // scale [n], or absent [0]
                           .Arg<Buffer>()  // bias [n]
                           .Arg<Buffer>()  // residual [*b p q n], or absent [0]
                           .Ret<Buffer>()  // y [*b p q n]
                           .Attr<Pair>("kernel")
                           .Attr<Pair>("strides")
                           .Attr<Pair>("dilation")
                           .Attr<Pair>("before")
                           .Attr<Pair>("pool")
                           .Attr<int32_t>("relu"),
                       kTraits);

}  // namespace

std::span<const Target> ConvTargets() {
  static constexpr Target kTargets[] = {{"conv_fwd", kForward}};
  return kTargets;
}

}  // namespace zenith
