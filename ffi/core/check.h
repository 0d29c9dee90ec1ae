// Checks of what a handler was given. Every handler checks every operand and result against the
// others before it launches: the partitioner can hand a shard of the wrong operand to a call
// without any error of its own, and a kernel that trusted the sizes would read past the end.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "ffi/core/backend.h"
#include "ffi/kernels/types.h"
#include "xla/ffi/api/ffi.h"

namespace zenith {

/// An operand or result, with the name it has in its target's signature.
struct Operand {
  const char* name;
  ffi::AnyBuffer buffer;
  /// Where the last axes of the signature are among the last ones of the buffer, if they are not in
  /// the signature's order.
  std::span<const int8_t> order = {};

  Operand(const char* name, const ffi::AnyBuffer& buffer) : name(name), buffer(buffer) {}
  Operand(const char* name, ffi::Result<ffi::AnyBuffer>& result) : name(name), buffer(*result) {
    BeforeWrites(buffer.untyped_data(), static_cast<int64_t>(buffer.size_bytes()));
  }

  ffi::DataType type() const { return buffer.element_type(); }
  int64_t rank() const { return static_cast<int64_t>(buffer.dimensions().size()); }
  /// Size of an axis; a negative one counts from the last. 0 where there is no such axis, so that a
  /// call's sizes can be read before its ranks are checked.
  int64_t dim(int64_t axis) const {
    if (axis < 0) axis += rank();
    const int64_t first = rank() - static_cast<int64_t>(order.size());
    if (axis >= first && axis < rank() && first >= 0 && !order.empty()) {
      axis = first + order[static_cast<size_t>(axis - first)];
    }
    return axis < 0 || axis >= rank() ? 0 : buffer.dimensions()[static_cast<size_t>(axis)];
  }
  int64_t size() const { return static_cast<int64_t>(buffer.element_count()); }
  /// Product of the axes before the last `trailing` ones.
  int64_t leading_size(int64_t trailing) const;

  template <typename T = void>
  T* data() const {
    return static_cast<T*>(buffer.untyped_data());
  }
};

/// Collects the first broken invariant of a call. The checks are cheap; text is made only on
/// failure. A check that needs an earlier one to have held does nothing after a failure.
///
///   Check check("rms_norm_fwd");
///   check.Float(x);
///   check.RankAtLeast(x, 1);
///   check.Shape(scale, x, 0, {cols});
///   if (check.failed()) return check.error();
class Check {
 public:
  explicit Check(const char* target) : target_(target) {}

  bool failed() const { return failed_; }
  ffi::Error error() const { return ffi::Error::InvalidArgument(message_); }

  /// float32, float16 or bfloat16.
  void Float(const Operand& x);
  void Type(const Operand& x, ffi::DataType type);
  void SameType(const Operand& x, const Operand& like);
  /// The dtype of `like`, or float32.
  void SameTypeOrF32(const Operand& x, const Operand& like);
  void RankAtLeast(const Operand& x, int64_t rank);
  /// x.shape == like.shape[:leading] + trailing.
  void Shape(const Operand& x, const Operand& like, int64_t leading,
             std::initializer_list<int64_t> trailing);
  void SameShape(const Operand& x, const Operand& like) { Shape(x, like, like.rank(), {}); }
  /// Both SameType and SameShape.
  void Same(const Operand& x, const Operand& like);
  void Size(const Operand& x, int64_t size, const char* why);
  /// An attribute or another condition; `invariant` says what must hold, `got` what came.
  void That(bool holds, const char* invariant, int64_t got);

 private:
  void Fail(std::string message);

  const char* target_;
  bool failed_ = false;
  std::string message_;
};

/// The kernels' name of a dtype that `Check::Float` let pass.
DType DTypeOf(const Operand& x);

}  // namespace zenith
