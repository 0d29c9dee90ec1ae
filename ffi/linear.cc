// Custom-call targets of the linear layer. Contract: ffi/kernels/linear.h.
//
// Axes: *b batch, r rows of a group, k features of x, n of y.
#include "ffi/kernels/linear.h"

#include "ffi/core/backend.h"
#include "ffi/core/check.h"
#include "ffi/core/target.h"

namespace zenith {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

ffi::Error Layer(const char* target, Context context, const Operand& x, const Operand& w,
                 const Operand& bias, const Operand& residual, const Operand& y, const Operand* pre,
                 int32_t activation, int32_t layout) {
  constexpr int32_t kLastEpilogue = static_cast<int32_t>(Epilogue::kGeluErf),
                    kLastLayout = static_cast<int32_t>(WeightLayout::kPanels);
  Check check(target);
  check.Float(x);
  check.RankAtLeast(x, 1);
  check.SameType(w, x);
  check.SameTypeOrF32(bias, x);
  const int64_t n = bias.dim(-1), k = x.dim(-1);
  check.Size(w, k * n, "k * n");
  check.Size(bias, n, "n");
  check.That(bias.rank() == 1, "bias must have rank 1", bias.rank());
  check.That(w.rank() == 1, "w must have rank 1", w.rank());
  const bool has_residual = residual.size() != 0 || residual.rank() != 1;
  if (has_residual) check.Shape(residual, x, x.rank() - 1, {n});
  check.SameType(residual, x);
  check.Shape(y, x, x.rank() - 1, {n});
  check.SameType(y, x);
  if (pre != nullptr) check.Same(*pre, y);
  check.That(activation >= 0 && activation <= kLastEpilogue, "activation must be 0 to 6",
             activation);
  check.That(layout >= 0 && layout <= kLastLayout, "layout must be 0 to 2", layout);
  check.That(layout != kLastLayout || n % kPanelColumns == 0, "panels must be whole", n);
  if (check.failed()) return check.error();

  const LinearForwardArgs args{.epilogue = static_cast<Epilogue>(activation),
                               .dtype = DTypeOf(x),
                               .bias_dtype = DTypeOf(bias),
                               .layout = static_cast<WeightLayout>(layout),
                               .rows = x.leading_size(1),
                               .k = k,
                               .n = n,
                               .x = x.data(),
                               .w = w.data(),
                               .bias = bias.data(),
                               .residual = has_residual ? residual.data() : nullptr,
                               .y = y.data(),
                               .pre = pre != nullptr ? pre->data() : nullptr};
  return Run(target, context, [&](const Launch& launch) { return LinearForward(args, launch); });
}

ffi::Error Forward(Context context, Buffer x, Buffer w, Buffer bias, Buffer residual, Result y,
                   int32_t activation, int32_t layout) {
  return Layer("linear_fwd", context, {"x", x}, {"w", w}, {"bias", bias}, {"residual", residual},
               {"y", y}, nullptr, activation, layout);
}

XLA_FFI_DEFINE_HANDLER(kForward, Forward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b k]
                           .Arg<Buffer>()  // w [k * n]
                           .Arg<Buffer>()  // bias [n]
                           .Arg<Buffer>()  // residual [*b n], or absent [0]
                           .Ret<Buffer>()  // y [*b n]
                           .Attr<int32_t>("activation")
                           .Attr<int32_t>("layout"),
                       kTraits);

ffi::Error ForwardPre(Context context, Buffer x, Buffer w, Buffer bias, Buffer residual, Result y,
                      Result pre, int32_t activation, int32_t layout) {
  const Operand saved("pre", pre);
  return Layer("linear_pre_fwd", context, {"x", x}, {"w", w}, {"bias", bias},
               {"residual", residual}, {"y", y}, &saved, activation, layout);
}

XLA_FFI_DEFINE_HANDLER(kForwardPre, ForwardPre,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b k]
                           .Arg<Buffer>()  // w [k * n]
                           .Arg<Buffer>()  // bias [n]
                           .Arg<Buffer>()  // residual [*b n], or absent [0]
                           .Ret<Buffer>()  // y [*b n]
                           .Ret<Buffer>()  // pre [*b n]
                           .Attr<int32_t>("activation")
                           .Attr<int32_t>("layout"),
                       kTraits);

ffi::Error Backward(Context context, Buffer pre_buffer, Buffer dy_buffer, Result dpre_buffer,
                    Result dbias_buffer, int32_t activation) {
  constexpr const char* kTarget = "linear_bwd";
  constexpr int32_t kLastActivation = static_cast<int32_t>(Activation::kSilu);
  const Operand pre("pre", pre_buffer), dy("dy", dy_buffer), dpre("dpre", dpre_buffer),
      dbias("dbias", dbias_buffer);
  Check check(kTarget);
  check.Float(pre);
  check.RankAtLeast(pre, 2);
  check.Same(dy, pre);
  check.Same(dpre, pre);
  check.Type(dbias, ffi::DataType::F32);
  check.Shape(dbias, pre, pre.rank() - 2, {pre.dim(-1)});
  check.That(activation >= 0 && activation <= kLastActivation, "activation must be 0 to 2",
             activation);
  if (check.failed()) return check.error();

  const LinearBackwardArgs args{.kind = static_cast<Activation>(activation),
                                .dtype = DTypeOf(pre),
                                .groups = pre.leading_size(2),
                                .rows_per_group = pre.dim(-2),
                                .n = pre.dim(-1),
                                .pre = pre.data(),
                                .dy = dy.data(),
                                .dpre = dpre.data(),
                                .dbias = dbias.data<float>()};
  return Run(kTarget, context, [&](const Launch& launch) { return LinearBackward(args, launch); });
}

XLA_FFI_DEFINE_HANDLER(kBackward, Backward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // pre [*b r n]
                           .Arg<Buffer>()  // dy [*b r n]
                           .Ret<Buffer>()  // dpre [*b r n]
                           .Ret<Buffer>()  // dbias [*b n]
                           .Attr<int32_t>("activation"),
                       kTraits);

}  // namespace

std::span<const Target> LinearTargets() {
  static constexpr Target kTargets[] = {
      {"linear_fwd", kForward}, {"linear_pre_fwd", kForwardPre}, {"linear_bwd", kBackward}};
  return kTargets;
}

}  // namespace zenith
