// Custom-call targets of cross entropy's row statistics and their cotangent. Contract:
// ffi/kernels/cross_entropy.h. Axes: *b batch, d classes.
#include "ffi/kernels/cross_entropy.h"

#include <initializer_list>

#include "ffi/core/backend.h"
#include "ffi/core/check.h"
#include "ffi/core/target.h"

namespace zenith {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

/// logits [*b d], labels [*b] int32, and `rows`: [*b] float32.
void CheckOperands(Check& check, const Operand& logits, const Operand& labels,
                   std::initializer_list<Operand> rows) {
  check.Float(logits);
  check.RankAtLeast(logits, 1);
  if (check.failed()) return;
  check.Type(labels, ffi::DataType::S32);
  check.Shape(labels, logits, logits.rank() - 1, {});
  for (const Operand& row : rows) {
    check.Type(row, ffi::DataType::F32);
    check.Shape(row, logits, logits.rank() - 1, {});
  }
  check.That(logits.dim(-1) > 0, "every row must have a class", logits.dim(-1));
}

ffi::Error Forward(Context context, Buffer logits_buffer, Buffer labels_buffer, Result lse_buffer,
                   Result picked_buffer, Result total_buffer) {
  const Operand logits("logits", logits_buffer), labels("labels", labels_buffer),
      lse("lse", lse_buffer), picked("picked", picked_buffer), total("total", total_buffer);
  Check check("cross_entropy_fwd");
  CheckOperands(check, logits, labels, {lse, picked, total});
  if (check.failed()) return check.error();

  const CrossEntropyForwardArgs args{.dtype = DTypeOf(logits),
                                     .rows = logits.leading_size(1),
                                     .cols = logits.dim(-1),
                                     .logits = logits.data(),
                                     .labels = labels.data<const int32_t>(),
                                     .lse = lse.data<float>(),
                                     .picked = picked.data<float>(),
                                     .total = total.data<float>()};
  return Run("cross_entropy_fwd", context,
             [&](const Launch& launch) { return CrossEntropyForward(args, launch); });
}

XLA_FFI_DEFINE_HANDLER(kForward, Forward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()   // logits [*b d]
                           .Arg<Buffer>()   // labels [*b], int32
                           .Ret<Buffer>()   // lse [*b], float32
                           .Ret<Buffer>()   // picked [*b], float32
                           .Ret<Buffer>(),  // total [*b], float32
                       kTraits);

ffi::Error Backward(Context context, Buffer logits_buffer, Buffer labels_buffer, Buffer lse_buffer,
                    Buffer dlse_buffer, Buffer dpicked_buffer, Buffer dtotal_buffer,
                    Result dlogits_buffer) {
  const Operand logits("logits", logits_buffer), labels("labels", labels_buffer),
      lse("lse", lse_buffer), dlse("dlse", dlse_buffer), dpicked("dpicked", dpicked_buffer),
      dtotal("dtotal", dtotal_buffer), dlogits("dlogits", dlogits_buffer);
  Check check("cross_entropy_bwd");
  CheckOperands(check, logits, labels, {lse, dlse, dpicked, dtotal});
  check.Same(dlogits, logits);
  if (check.failed()) return check.error();

  const CrossEntropyBackwardArgs args{.dtype = DTypeOf(logits),
                                      .rows = logits.leading_size(1),
                                      .cols = logits.dim(-1),
                                      .logits = logits.data(),
                                      .labels = labels.data<const int32_t>(),
                                      .lse = lse.data<const float>(),
                                      .dlse = dlse.data<const float>(),
                                      .dpicked = dpicked.data<const float>(),
                                      .dtotal = dtotal.data<const float>(),
                                      .dlogits = dlogits.data()};
  return Run("cross_entropy_bwd", context,
             [&](const Launch& launch) { return CrossEntropyBackward(args, launch); });
}

XLA_FFI_DEFINE_HANDLER(kBackward, Backward,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()   // logits [*b d]
                           .Arg<Buffer>()   // labels [*b], int32
                           .Arg<Buffer>()   // lse [*b], float32, the forward's result
                           .Arg<Buffer>()   // dlse [*b], float32
                           .Arg<Buffer>()   // dpicked [*b], float32
                           .Arg<Buffer>()   // dtotal [*b], float32
                           .Ret<Buffer>(),  // dlogits [*b d]
                       kTraits);

}  // namespace

std::span<const Target> CrossEntropyTargets() {
  static constexpr Target kTargets[] = {{"cross_entropy_fwd", kForward},
                                        {"cross_entropy_bwd", kBackward}};
  return kTargets;
}

}  // namespace zenith
