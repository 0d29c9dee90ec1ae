// Custom-call targets of a linear layer behind a gate, of the GPU only. Contract:
// ffi/kernels/linear.h.
//
// Axes: *b batch, k features of x, n of y.
#include "ffi/core/backend.h"
#include "ffi/core/check.h"
#include "ffi/core/target.h"
#include "ffi/kernels/linear.h"

namespace zenith {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

ffi::Error Layer(const char* target, Context context, const Operand& x, const Operand& w_gate,
                 const Operand& w_value, const Operand& y, const Operand* gate,
                 const Operand* value, int32_t activation, int32_t transposed) {
  constexpr int32_t kFirst = static_cast<int32_t>(Epilogue::kSilu);
  constexpr int32_t kLast = static_cast<int32_t>(Epilogue::kGeluErf);
  Check check(target);
  check.Float(x);
  check.RankAtLeast(x, 1);
  check.RankAtLeast(y, 1);
  const int64_t n = y.dim(-1), k = x.dim(-1);
  check.Shape(y, x, x.rank() - 1, {n});
  check.SameType(y, x);
  for (const Operand* w : {&w_gate, &w_value}) {
    check.SameType(*w, x);
    check.Size(*w, k * n, "k * n");
    check.That(w->rank() == 1, "w_gate and w_value must have rank 1", w->rank());
  }
  for (const Operand* product : {gate, value})
    if (product != nullptr) check.Same(*product, y);
  check.That(activation >= kFirst && activation <= kLast, "activation must be 4 to 6", activation);
  check.That(transposed == 0 || transposed == 1, "transposed must be 0 or 1", transposed);
  if (check.failed()) return check.error();

  const GatedLinearForwardArgs args{.epilogue = static_cast<Epilogue>(activation),
                                    .dtype = DTypeOf(x),
                                    .transposed = transposed == 1,
                                    .rows = x.leading_size(1),
                                    .k = k,
                                    .n = n,
                                    .x = x.data(),
                                    .w_gate = w_gate.data(),
                                    .w_value = w_value.data(),
                                    .y = y.data(),
                                    .gate = gate != nullptr ? gate->data() : nullptr,
                                    .value = value != nullptr ? value->data() : nullptr};
  return Run(target, context,
             [&](const Launch& launch) { return GatedLinearForward(args, launch); });
}

ffi::Error Forward(Context context, Buffer x, Buffer w_gate, Buffer w_value, Result y,
                   int32_t activation, int32_t transposed) {
  return Layer("gated_linear_fwd", context, {"x", x}, {"w_gate", w_gate}, {"w_value", w_value},
               {"y", y}, nullptr, nullptr, activation, transposed);
}

XLA_FFI_DEFINE_HANDLER(kForward, Forward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b k]
                           .Arg<Buffer>()  // w_gate [k * n]
                           .Arg<Buffer>()  // w_value [k * n]
                           .Ret<Buffer>()  // y [*b n]
                           .Attr<int32_t>("activation")
                           .Attr<int32_t>("transposed"),
                       kTraits);

ffi::Error ForwardPre(Context context, Buffer x, Buffer w_gate, Buffer w_value, Result y,
                      Result gate, Result value, int32_t activation, int32_t transposed) {
  const Operand saved_gate("gate", gate), saved_value("value", value);
  return Layer("gated_linear_pre_fwd", context, {"x", x}, {"w_gate", w_gate}, {"w_value", w_value},
               {"y", y}, &saved_gate, &saved_value, activation, transposed);
}

XLA_FFI_DEFINE_HANDLER(kForwardPre, ForwardPre,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b k]
                           .Arg<Buffer>()  // w_gate [k * n]
                           .Arg<Buffer>()  // w_value [k * n]
                           .Ret<Buffer>()  // y [*b n]
                           .Ret<Buffer>()  // gate [*b n]
                           .Ret<Buffer>()  // value [*b n]
                           .Attr<int32_t>("activation")
                           .Attr<int32_t>("transposed"),
                       kTraits);

}  // namespace

std::span<const Target> GatedLinearTargets() {
  static constexpr Target kTargets[] = {{"gated_linear_fwd", kForward},
                                        {"gated_linear_pre_fwd", kForwardPre}};
  return kTargets;
}

}  // namespace zenith
