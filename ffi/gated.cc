// Custom-call targets of f(gate) * value and its cotangents, of two arrays of any shape, or of the
// halves of one. Contract: ffi/kernels/gated.h.
#include "ffi/kernels/gated.h"

#include "ffi/core/backend.h"
#include "ffi/core/check.h"
#include "ffi/core/target.h"

namespace zenith {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

struct Names {
  const char *forward, *backward, *halves_forward, *halves_backward;
};

constexpr Names NamesOf(Activation kind) {
  switch (kind) {
    case Activation::kGeluErf:
      return {"gated_gelu_erf_fwd", "gated_gelu_erf_bwd", "gated_gelu_erf_halves_fwd",
              "gated_gelu_erf_halves_bwd"};
    case Activation::kGeluTanh:
      return {"gated_gelu_tanh_fwd", "gated_gelu_tanh_bwd", "gated_gelu_tanh_halves_fwd",
              "gated_gelu_tanh_halves_bwd"};
    case Activation::kSilu:
      return {"gated_silu_fwd", "gated_silu_bwd", "gated_silu_halves_fwd", "gated_silu_halves_bwd"};
  }
}

template <Activation kKind>
ffi::Error Forward(Context context, Buffer gate_buffer, Buffer value_buffer, Result y_buffer) {
  const Operand gate("gate", gate_buffer), value("value", value_buffer), y("y", y_buffer);
  Check check(NamesOf(kKind).forward);
  check.Float(gate);
  check.Same(value, gate);
  check.Same(y, gate);
  if (check.failed()) return check.error();

  const GatedForwardArgs args{.kind = kKind,
                              .dtype = DTypeOf(gate),
                              .rows = 1,
                              .cols = gate.size(),
                              .stride = gate.size(),
                              .gate = gate.data(),
                              .value = value.data(),
                              .y = y.data()};
  return Run(NamesOf(kKind).forward, context,
             [&](const Launch& launch) { return GatedForward(args, launch); });
}

template <Activation kKind>
ffi::Error Backward(Context context, Buffer gate_buffer, Buffer value_buffer, Buffer dy_buffer,
                    Result dgate_buffer, Result dvalue_buffer) {
  const Operand gate("gate", gate_buffer), value("value", value_buffer), dy("dy", dy_buffer);
  const Operand dgate("dgate", dgate_buffer), dvalue("dvalue", dvalue_buffer);
  Check check(NamesOf(kKind).backward);
  check.Float(gate);
  for (const Operand& other : {value, dy, dgate, dvalue}) check.Same(other, gate);
  if (check.failed()) return check.error();

  const GatedBackwardArgs args{.kind = kKind,
                               .dtype = DTypeOf(gate),
                               .rows = 1,
                               .cols = gate.size(),
                               .stride = gate.size(),
                               .gate = gate.data(),
                               .value = value.data(),
                               .dy = dy.data(),
                               .dgate = dgate.data(),
                               .dvalue = dvalue.data()};
  return Run(NamesOf(kKind).backward, context,
             [&](const Launch& launch) { return GatedBackward(args, launch); });
}

/// Element i of `half` (0 or 1) of each row of `x` [*b 2 d].
char* Half(const Operand& x, int64_t half) {
  const int64_t element_bytes = DTypeOf(x) == DType::kF32 ? 4 : 2;
  return x.data<char>() + half * x.dim(-1) * element_bytes;
}

void CheckHalves(Check& check, const Operand& x, int64_t gate_half) {
  check.Float(x);
  check.RankAtLeast(x, 2);
  check.That(x.dim(-2) == 2, "x must have size 2 along its second last axis", x.dim(-2));
  check.That(gate_half == 0 || gate_half == 1, "gate_half must be 0 or 1", gate_half);
}

template <Activation kKind>
ffi::Error HalvesForward(Context context, Buffer x_buffer, Result y_buffer, int64_t gate_half) {
  const Operand x("x", x_buffer), y("y", y_buffer);
  Check check(NamesOf(kKind).halves_forward);
  CheckHalves(check, x, gate_half);
  check.SameType(y, x);
  check.Shape(y, x, x.rank() - 2, {x.dim(-1)});
  if (check.failed()) return check.error();

  const GatedForwardArgs args{.kind = kKind,
                              .dtype = DTypeOf(x),
                              .rows = x.leading_size(2),
                              .cols = x.dim(-1),
                              .stride = 2 * x.dim(-1),
                              .gate = Half(x, gate_half),
                              .value = Half(x, 1 - gate_half),
                              .y = y.data()};
  return Run(NamesOf(kKind).halves_forward, context,
             [&](const Launch& launch) { return GatedForward(args, launch); });
}

template <Activation kKind>
ffi::Error HalvesBackward(Context context, Buffer x_buffer, Buffer dy_buffer, Result dx_buffer,
                          int64_t gate_half) {
  const Operand x("x", x_buffer), dy("dy", dy_buffer), dx("dx", dx_buffer);
  Check check(NamesOf(kKind).halves_backward);
  CheckHalves(check, x, gate_half);
  check.SameType(dy, x);
  check.Shape(dy, x, x.rank() - 2, {x.dim(-1)});
  check.Same(dx, x);
  if (check.failed()) return check.error();

  const GatedBackwardArgs args{.kind = kKind,
                               .dtype = DTypeOf(x),
                               .rows = x.leading_size(2),
                               .cols = x.dim(-1),
                               .stride = 2 * x.dim(-1),
                               .gate = Half(x, gate_half),
                               .value = Half(x, 1 - gate_half),
                               .dy = dy.data(),
                               .dgate = Half(dx, gate_half),
                               .dvalue = Half(dx, 1 - gate_half)};
  return Run(NamesOf(kKind).halves_backward, context,
             [&](const Launch& launch) { return GatedBackward(args, launch); });
}

template <Activation kKind>
XLA_FFI_Error* ForwardHandler(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, Forward<kKind>,
                         ffi::Ffi::Bind()
                             .Ctx<Place>()
                             .template Arg<Buffer>()   // gate [*b]
                             .template Arg<Buffer>()   // value [*b]
                             .template Ret<Buffer>(),  // y [*b]
                         kTraits);
  return handler(frame);
}

template <Activation kKind>
XLA_FFI_Error* BackwardHandler(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, Backward<kKind>,
                         ffi::Ffi::Bind()
                             .Ctx<Place>()
                             .template Arg<Buffer>()   // gate [*b]
                             .template Arg<Buffer>()   // value [*b]
                             .template Arg<Buffer>()   // dy [*b]
                             .template Ret<Buffer>()   // dgate [*b]
                             .template Ret<Buffer>(),  // dvalue [*b]
                         kTraits);
  return handler(frame);
}

template <Activation kKind>
XLA_FFI_Error* HalvesForwardHandler(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, HalvesForward<kKind>,
                         ffi::Ffi::Bind()
                             .Ctx<Place>()
                             .template Arg<Buffer>()  // x [*b 2 d]
                             .template Ret<Buffer>()  // y [*b d]
                             .template Attr<int64_t>("gate_half"),
                         kTraits);
  return handler(frame);
}

template <Activation kKind>
XLA_FFI_Error* HalvesBackwardHandler(XLA_FFI_CallFrame* frame) {
  XLA_FFI_DEFINE_HANDLER(handler, HalvesBackward<kKind>,
                         ffi::Ffi::Bind()
                             .Ctx<Place>()
                             .template Arg<Buffer>()  // x [*b 2 d]
                             .template Arg<Buffer>()  // dy [*b d]
                             .template Ret<Buffer>()  // dx [*b 2 d]
                             .template Attr<int64_t>("gate_half"),
                         kTraits);
  return handler(frame);
}

}  // namespace

std::span<const Target> GatedTargets() {
  using enum Activation;
  static constexpr Target kTargets[] = {
      {NamesOf(kGeluErf).forward, &ForwardHandler<kGeluErf>},
      {NamesOf(kGeluErf).backward, &BackwardHandler<kGeluErf>},
      {NamesOf(kGeluErf).halves_forward, &HalvesForwardHandler<kGeluErf>},
      {NamesOf(kGeluErf).halves_backward, &HalvesBackwardHandler<kGeluErf>},
      {NamesOf(kGeluTanh).forward, &ForwardHandler<kGeluTanh>},
      {NamesOf(kGeluTanh).backward, &BackwardHandler<kGeluTanh>},
      {NamesOf(kGeluTanh).halves_forward, &HalvesForwardHandler<kGeluTanh>},
      {NamesOf(kGeluTanh).halves_backward, &HalvesBackwardHandler<kGeluTanh>},
      {NamesOf(kSilu).forward, &ForwardHandler<kSilu>},
      {NamesOf(kSilu).backward, &BackwardHandler<kSilu>},
      {NamesOf(kSilu).halves_forward, &HalvesForwardHandler<kSilu>},
      {NamesOf(kSilu).halves_backward, &HalvesBackwardHandler<kSilu>},
  };
  return kTargets;
}

}  // namespace zenith
