// Custom-call targets of the normalisations: layer_norm and rms_norm, with or without a residual
// added first, and their cotangents. Contract: ffi/kernels/norm.h.
//
// Axes: *b batch, r rows, g groups of rows, d features. Attribute eps: float32.
#include "ffi/kernels/norm.h"

#include <optional>

#include "ffi/core/backend.h"
#include "ffi/core/check.h"
#include "ffi/core/target.h"

namespace zenith {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

const void* DataOrNull(const std::optional<Operand>& x) { return x ? x->data() : nullptr; }

struct ForwardCall {
  const char* target;
  NormKind kind;
  Operand x;
  std::optional<Operand> residual = {};
  Operand scale;
  std::optional<Operand> bias = {};
  Operand y;
  std::optional<Operand> sum = {};
  float eps;
};

ffi::Error Forward(Context& context, const ForwardCall& call) {
  const int64_t cols = call.x.dim(-1);
  Check check(call.target);
  check.Float(call.x);
  check.RankAtLeast(call.x, 1);
  if (call.residual) check.Same(*call.residual, call.x);
  check.SameTypeOrF32(call.scale, call.x);
  check.Shape(call.scale, call.x, 0, {cols});
  if (call.bias) check.Same(*call.bias, call.scale);
  check.Same(call.y, call.x);
  if (call.sum) check.Same(*call.sum, call.x);
  if (check.failed()) return check.error();

  const NormForwardArgs args{
      .kind = call.kind,
      .dtype = DTypeOf(call.x),
      .param_dtype = DTypeOf(call.scale),
      .rows = call.x.leading_size(1),
      .cols = cols,
      .eps = call.eps,
      .x = call.x.data(),
      .residual = DataOrNull(call.residual),
      .scale = call.scale.data(),
      .bias = DataOrNull(call.bias),
      .y = call.y.data(),
      .sum = call.sum ? call.sum->data() : nullptr,
  };
  return Run(call.target, context, [&](const Launch& launch) { return NormForward(args, launch); });
}

struct BackwardCall {
  const char* target;
  NormKind kind;
  Operand x, scale, dy;
  std::optional<Operand> dsum = {};
  Operand dx, dscale;
  std::optional<Operand> dbias = {};
  float eps;
};

ffi::Error Backward(Context& context, const BackwardCall& call) {
  const int64_t cols = call.x.dim(-1);
  const int64_t batch_rank = call.x.rank() - 2, groups = call.dscale.dim(-2);
  Check check(call.target);
  check.Float(call.x);
  check.RankAtLeast(call.x, 2);
  check.SameTypeOrF32(call.scale, call.x);
  check.Shape(call.scale, call.x, 0, {cols});
  check.Same(call.dy, call.x);
  if (call.dsum) check.Same(*call.dsum, call.x);
  check.Same(call.dx, call.x);
  check.Type(call.dscale, ffi::DataType::F32);
  check.RankAtLeast(call.dscale, 2);
  check.Shape(call.dscale, call.x, batch_rank, {groups, cols});
  check.That(groups > 0, "dscale must have a group of rows", groups);
  if (call.dbias) check.Same(*call.dbias, call.dscale);
  if (check.failed()) return check.error();

  const NormBackwardArgs args{
      .kind = call.kind,
      .dtype = DTypeOf(call.x),
      .param_dtype = DTypeOf(call.scale),
      .batch = call.x.leading_size(2),
      .rows = call.x.dim(-2),
      .groups = groups,
      .cols = cols,
      .eps = call.eps,
      .x = call.x.data(),
      .scale = call.scale.data(),
      .dy = call.dy.data(),
      .dsum = DataOrNull(call.dsum),
      .dx = call.dx.data(),
      .dscale = call.dscale.data<float>(),
      .dbias = call.dbias ? call.dbias->data<float>() : nullptr,
  };
  return Run(call.target, context,
             [&](const Launch& launch) { return NormBackward(args, launch); });
}

// ---- Targets ------------------------------------------------------------------------------------

ffi::Error LayerNormForward(Context context, Buffer x, Buffer scale, Buffer bias, Result y,
                            float eps) {
  return Forward(context, {.target = "layer_norm_fwd",
                           .kind = NormKind::kLayer,
                           .x = {"x", x},
                           .scale = {"scale", scale},
                           .bias = Operand{"bias", bias},
                           .y = {"y", y},
                           .eps = eps});
}

XLA_FFI_DEFINE_HANDLER(kLayerNormForward, LayerNormForward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b d]
                           .Arg<Buffer>()  // scale [d]
                           .Arg<Buffer>()  // bias [d]
                           .Ret<Buffer>()  // y [*b d]
                           .Attr<float>("eps"),
                       kTraits);

ffi::Error RmsNormForward(Context context, Buffer x, Buffer scale, Result y, float eps) {
  return Forward(context, {.target = "rms_norm_fwd",
                           .kind = NormKind::kRms,
                           .x = {"x", x},
                           .scale = {"scale", scale},
                           .y = {"y", y},
                           .eps = eps});
}

XLA_FFI_DEFINE_HANDLER(kRmsNormForward, RmsNormForward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b d]
                           .Arg<Buffer>()  // scale [d]
                           .Ret<Buffer>()  // y [*b d]
                           .Attr<float>("eps"),
                       kTraits);

ffi::Error AddLayerNormForward(Context context, Buffer x, Buffer residual, Buffer scale,
                               Buffer bias, Result y, Result sum, float eps) {
  return Forward(context, {.target = "add_layer_norm_fwd",
                           .kind = NormKind::kLayer,
                           .x = {"x", x},
                           .residual = Operand{"residual", residual},
                           .scale = {"scale", scale},
                           .bias = Operand{"bias", bias},
                           .y = {"y", y},
                           .sum = Operand{"sum", sum},
                           .eps = eps});
}

XLA_FFI_DEFINE_HANDLER(kAddLayerNormForward, AddLayerNormForward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b d]
                           .Arg<Buffer>()  // residual [*b d]
                           .Arg<Buffer>()  // scale [d]
                           .Arg<Buffer>()  // bias [d]
                           .Ret<Buffer>()  // y [*b d]
                           .Ret<Buffer>()  // sum [*b d]
                           .Attr<float>("eps"),
                       kTraits);

ffi::Error AddRmsNormForward(Context context, Buffer x, Buffer residual, Buffer scale, Result y,
                             Result sum, float eps) {
  return Forward(context, {.target = "add_rms_norm_fwd",
                           .kind = NormKind::kRms,
                           .x = {"x", x},
                           .residual = Operand{"residual", residual},
                           .scale = {"scale", scale},
                           .y = {"y", y},
                           .sum = Operand{"sum", sum},
                           .eps = eps});
}

XLA_FFI_DEFINE_HANDLER(kAddRmsNormForward, AddRmsNormForward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b d]
                           .Arg<Buffer>()  // residual [*b d]
                           .Arg<Buffer>()  // scale [d]
                           .Ret<Buffer>()  // y [*b d]
                           .Ret<Buffer>()  // sum [*b d]
                           .Attr<float>("eps"),
                       kTraits);

ffi::Error LayerNormBackward(Context context, Buffer x, Buffer scale, Buffer dy, Result dx,
                             Result dscale, Result dbias, float eps) {
  return Backward(context, {.target = "layer_norm_bwd",
                            .kind = NormKind::kLayer,
                            .x = {"x", x},
                            .scale = {"scale", scale},
                            .dy = {"dy", dy},
                            .dx = {"dx", dx},
                            .dscale = {"dscale", dscale},
                            .dbias = Operand{"dbias", dbias},
                            .eps = eps});
}

XLA_FFI_DEFINE_HANDLER(kLayerNormBackward, LayerNormBackward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b r d]
                           .Arg<Buffer>()  // scale [d]
                           .Arg<Buffer>()  // dy [*b r d]
                           .Ret<Buffer>()  // dx [*b r d]
                           .Ret<Buffer>()  // dscale [*b g d], float32
                           .Ret<Buffer>()  // dbias [*b g d], float32
                           .Attr<float>("eps"),
                       kTraits);

ffi::Error RmsNormBackward(Context context, Buffer x, Buffer scale, Buffer dy, Result dx,
                           Result dscale, float eps) {
  return Backward(context, {.target = "rms_norm_bwd",
                            .kind = NormKind::kRms,
                            .x = {"x", x},
                            .scale = {"scale", scale},
                            .dy = {"dy", dy},
                            .dx = {"dx", dx},
                            .dscale = {"dscale", dscale},
                            .eps = eps});
}

XLA_FFI_DEFINE_HANDLER(kRmsNormBackward, RmsNormBackward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b r d]
                           .Arg<Buffer>()  // scale [d]
                           .Arg<Buffer>()  // dy [*b r d]
                           .Ret<Buffer>()  // dx [*b r d]
                           .Ret<Buffer>()  // dscale [*b g d], float32
                           .Attr<float>("eps"),
                       kTraits);

ffi::Error AddLayerNormBackward(Context context, Buffer x, Buffer scale, Buffer dy, Buffer dsum,
                                Result dx, Result dscale, Result dbias, float eps) {
  return Backward(context, {.target = "add_layer_norm_bwd",
                            .kind = NormKind::kLayer,
                            .x = {"x", x},
                            .scale = {"scale", scale},
                            .dy = {"dy", dy},
                            .dsum = Operand{"dsum", dsum},
                            .dx = {"dx", dx},
                            .dscale = {"dscale", dscale},
                            .dbias = Operand{"dbias", dbias},
                            .eps = eps});
}

XLA_FFI_DEFINE_HANDLER(kAddLayerNormBackward, AddLayerNormBackward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b r d], the forward's sum
                           .Arg<Buffer>()  // scale [d]
                           .Arg<Buffer>()  // dy [*b r d]
                           .Arg<Buffer>()  // dsum [*b r d]
                           .Ret<Buffer>()  // dx [*b r d], of x and of residual alike
                           .Ret<Buffer>()  // dscale [*b g d], float32
                           .Ret<Buffer>()  // dbias [*b g d], float32
                           .Attr<float>("eps"),
                       kTraits);

ffi::Error AddRmsNormBackward(Context context, Buffer x, Buffer scale, Buffer dy, Buffer dsum,
                              Result dx, Result dscale, float eps) {
  return Backward(context, {.target = "add_rms_norm_bwd",
                            .kind = NormKind::kRms,
                            .x = {"x", x},
                            .scale = {"scale", scale},
                            .dy = {"dy", dy},
                            .dsum = Operand{"dsum", dsum},
                            .dx = {"dx", dx},
                            .dscale = {"dscale", dscale},
                            .eps = eps});
}

XLA_FFI_DEFINE_HANDLER(kAddRmsNormBackward, AddRmsNormBackward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b r d], the forward's sum
                           .Arg<Buffer>()  // scale [d]
                           .Arg<Buffer>()  // dy [*b r d]
                           .Arg<Buffer>()  // dsum [*b r d]
                           .Ret<Buffer>()  // dx [*b r d], of x and of residual alike
                           .Ret<Buffer>()  // dscale [*b g d], float32
                           .Attr<float>("eps"),
                       kTraits);

}  // namespace

std::span<const Target> NormTargets() {
  static constexpr Target kTargets[] = {
      {"layer_norm_fwd", kLayerNormForward},         {"rms_norm_fwd", kRmsNormForward},
      {"add_layer_norm_fwd", kAddLayerNormForward},  {"add_rms_norm_fwd", kAddRmsNormForward},
      {"layer_norm_bwd", kLayerNormBackward},        {"rms_norm_bwd", kRmsNormBackward},
      {"add_layer_norm_bwd", kAddLayerNormBackward}, {"add_rms_norm_bwd", kAddRmsNormBackward},
  };
  return kTargets;
}

}  // namespace zenith
