// Custom-call targets of the elementwise activations and their cotangents, of any shape. Contract:
// ffi/kernels/activation.h.
#include "ffi/kernels/activation.h"

#include "ffi/core/backend.h"
#include "ffi/core/check.h"
#include "ffi/core/target.h"

namespace zenith {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

constexpr const char* ForwardName(Activation kind) {
  switch (kind) {
    case Activation::kGeluErf:
      return "gelu_erf_fwd";
    case Activation::kGeluTanh:
      return "gelu_tanh_fwd";
    case Activation::kSilu:
      return "silu_fwd";
  }
}

constexpr const char* BackwardName(Activation kind) {
  switch (kind) {
    case Activation::kGeluErf:
      return "gelu_erf_bwd";
    case Activation::kGeluTanh:
      return "gelu_tanh_bwd";
    case Activation::kSilu:
      return "silu_bwd";
  }
}

template <Activation kKind>
ffi::Error Forward(Context context, Buffer x_buffer, Result y_buffer) {
  const Operand x("x", x_buffer), y("y", y_buffer);
  Check check(ForwardName(kKind));
  check.Float(x);
  check.Same(y, x);
  if (check.failed()) return check.error();

  const ActivationForwardArgs args{
      .kind = kKind, .dtype = DTypeOf(x), .size = x.size(), .x = x.data(), .y = y.data()};
  return Run(ForwardName(kKind), context,
             [&](const Launch& launch) { return ActivationForward(args, launch); });
}

template <Activation kKind>
ffi::Error Backward(Context context, Buffer x_buffer, Buffer dy_buffer, Result dx_buffer) {
  const Operand x("x", x_buffer), dy("dy", dy_buffer), dx("dx", dx_buffer);
  Check check(BackwardName(kKind));
  check.Float(x);
  check.Same(dy, x);
  check.Same(dx, x);
  if (check.failed()) return check.error();

  const ActivationBackwardArgs args{.kind = kKind,
                                    .dtype = DTypeOf(x),
                                    .size = x.size(),
                                    .x = x.data(),
                                    .dy = dy.data(),
                                    .dx = dx.data()};
  return Run(BackwardName(kKind), context,
             [&](const Launch& launch) { return ActivationBackward(args, launch); });
}

template <Activation kKind>
XLA_FFI_Error* ForwardHandler(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, Forward<kKind>,
                         ffi::Ffi::Bind()
                             .Ctx<Place>()
                             .template Arg<Buffer>()   // x [*b]
                             .template Ret<Buffer>(),  // y [*b]
                         kTraits);
  return handler(frame);
}

template <Activation kKind>
XLA_FFI_Error* BackwardHandler(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, Backward<kKind>,
                         ffi::Ffi::Bind()
                             .Ctx<Place>()
                             .template Arg<Buffer>()   // x [*b]
                             .template Arg<Buffer>()   // dy [*b]
                             .template Ret<Buffer>(),  // dx [*b]
                         kTraits);
  return handler(frame);
}

template <Activation kKind>
constexpr Target kForwardTarget = {ForwardName(kKind), &ForwardHandler<kKind>};

template <Activation kKind>
constexpr Target kBackwardTarget = {BackwardName(kKind), &BackwardHandler<kKind>};

}  // namespace

std::span<const Target> ActivationTargets() {
  static constexpr Target kTargets[] = {
      kForwardTarget<Activation::kGeluErf>,  kBackwardTarget<Activation::kGeluErf>,
      kForwardTarget<Activation::kGeluTanh>, kBackwardTarget<Activation::kGeluTanh>,
      kForwardTarget<Activation::kSilu>,     kBackwardTarget<Activation::kSilu>,
  };
  return kTargets;
}

}  // namespace zenith
