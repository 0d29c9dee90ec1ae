// Custom-call targets of softmax over the last axis and its cotangent. Contract:
// ffi/kernels/softmax.h. Axes: *b batch, d classes.
#include "ffi/kernels/softmax.h"

#include "ffi/core/backend.h"
#include "ffi/core/check.h"
#include "ffi/core/target.h"

namespace zenith {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

ffi::Error Forward(Context context, Buffer x_buffer, Result y_buffer) {
  const Operand x("x", x_buffer), y("y", y_buffer);
  Check check("softmax_fwd");
  check.Float(x);
  check.RankAtLeast(x, 1);
  check.Same(y, x);
  if (check.failed()) return check.error();

  const SoftmaxForwardArgs args{.dtype = DTypeOf(x),
                                .rows = x.leading_size(1),
                                .cols = x.dim(-1),
                                .x = x.data(),
                                .y = y.data()};
  return Run("softmax_fwd", context,
             [&](const Launch& launch) { return SoftmaxForward(args, launch); });
}

XLA_FFI_DEFINE_HANDLER(kForward, Forward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()   // x [*b d]
                           .Ret<Buffer>(),  // y [*b d]
                       kTraits);

ffi::Error Backward(Context context, Buffer y_buffer, Buffer dy_buffer, Result dx_buffer) {
  const Operand y("y", y_buffer), dy("dy", dy_buffer), dx("dx", dx_buffer);
  Check check("softmax_bwd");
  check.Float(y);
  check.RankAtLeast(y, 1);
  check.Same(dy, y);
  check.Same(dx, y);
  if (check.failed()) return check.error();

  const SoftmaxBackwardArgs args{.dtype = DTypeOf(y),
                                 .rows = y.leading_size(1),
                                 .cols = y.dim(-1),
                                 .y = y.data(),
                                 .dy = dy.data(),
                                 .dx = dx.data()};
  return Run("softmax_bwd", context,
             [&](const Launch& launch) { return SoftmaxBackward(args, launch); });
}

XLA_FFI_DEFINE_HANDLER(kBackward, Backward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()   // y [*b d], the forward's result
                           .Arg<Buffer>()   // dy [*b d]
                           .Ret<Buffer>(),  // dx [*b d]
                       kTraits);

}  // namespace

std::span<const Target> SoftmaxTargets() {
  static constexpr Target kTargets[] = {{"softmax_fwd", kForward}, {"softmax_bwd", kBackward}};
  return kTargets;
}

}  // namespace zenith
