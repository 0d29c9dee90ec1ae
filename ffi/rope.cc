// Custom-call target of rotary position embeddings and, transposed, of their cotangent. Contract:
// ffi/kernels/rope.h. Axes: *b batch, d features of a head, w coefficients.
#include "ffi/kernels/rope.h"

#include "ffi/core/backend.h"
#include "ffi/core/check.h"
#include "ffi/core/target.h"

namespace zenith {
namespace {

using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;

/// Neighbouring axes along which the tables go on, or stay, together, are one of `TableRows`.
TableRows RowsOf(Check& check, const Operand& x, const Operand& table) {
  TableRows rows;
  int64_t stride = 1;
  int axis = TableRows::kRank;
  bool last_is_shared = false;
  for (int64_t i = x.rank() - 2; i >= 0; --i) {
    const int64_t size = x.dim(i);
    const bool is_shared = table.dim(i) != size;
    check.That(!is_shared || table.dim(i) == 1,
               "cos must have the size of x or 1 along each axis but the last", table.dim(i));
    if (size == 1) continue;
    if (axis == TableRows::kRank || is_shared != last_is_shared) {
      check.That(axis > 0, "cos must lack few of the axes of x: at most 4 runs of axes", x.rank());
      if (axis == 0) break;
      rows.sizes[--axis] = 1;
      rows.strides[axis] = is_shared ? 0 : stride;
    }
    rows.sizes[axis] *= size;
    if (!is_shared) stride *= size;
    last_is_shared = is_shared;
  }
  while (axis > 0) rows.sizes[--axis] = 1, rows.strides[axis] = 0;
  return rows;
}

ffi::Error Rotate(Context context, Buffer x_buffer, Buffer cos_buffer, Buffer sin_buffer,
                  Result y_buffer, int64_t features, bool interleaved, bool transposed) {
  const Operand x("x", x_buffer), cos("cos", cos_buffer), sin("sin", sin_buffer), y("y", y_buffer);
  Check check("rope");
  check.Float(x);
  check.RankAtLeast(x, 1);
  check.Same(y, x);
  check.That(features % 2 == 0 && features >= 0, "features must be even", features);
  check.That(features <= x.dim(-1), "x must have at least `features` columns", x.dim(-1));
  check.Type(cos, ffi::DataType::F32);
  check.RankAtLeast(cos, x.rank());
  check.That(cos.rank() == x.rank(), "cos must have the rank of x", cos.rank());
  const int64_t width = cos.dim(-1);
  check.That(width == features || 2 * width == features,
             "cos must have a coefficient for each feature or each pair", width);
  check.Same(sin, cos);
  if (check.failed()) return check.error();
  const TableRows table_rows = RowsOf(check, x, cos);
  if (check.failed()) return check.error();

  const RopeArgs args{.dtype = DTypeOf(x),
                      .interleaved = interleaved,
                      .transposed = transposed,
                      .whole_tables = width == features,
                      .rows = x.leading_size(1),
                      .cols = x.dim(-1),
                      .features = features,
                      .table_rows = table_rows,
                      .x = x.data(),
                      .cos = cos.data<float>(),
                      .sin = sin.data<float>(),
                      .y = y.data()};
  return Run("rope", context, [&](const Launch& launch) { return Rope(args, launch); });
}

XLA_FFI_DEFINE_HANDLER(kRope, Rotate,
                       ffi::Ffi::Bind()
                           .Ctx<Place>()
                           .Arg<Buffer>()  // x [*b d]
                           .Arg<Buffer>()  // cos [*b w], sizes of *b may be 1
                           .Arg<Buffer>()  // sin, as cos
                           .Ret<Buffer>()  // y [*b d]
                           .Attr<int64_t>("features")
                           .Attr<bool>("interleaved")
                           .Attr<bool>("transposed"),
                       kTraits);

}  // namespace

std::span<const Target> RopeTargets() {
  static constexpr Target kTargets[] = {{"rope", kRope}};
  return kTargets;
}

}  // namespace zenith
