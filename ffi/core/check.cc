#include "ffi/core/check.h"

#include <string>
#include <utility>

namespace zenith {
namespace {

bool IsFloat(ffi::DataType type) {
  return type == ffi::DataType::F32 || type == ffi::DataType::F16 || type == ffi::DataType::BF16;
}

/// A dtype as jax prints it.
std::string Text(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::PRED:
      return "bool";
    case ffi::DataType::S8:
      return "int8";
    case ffi::DataType::S16:
      return "int16";
    case ffi::DataType::S32:
      return "int32";
    case ffi::DataType::S64:
      return "int64";
    case ffi::DataType::U8:
      return "uint8";
    case ffi::DataType::U16:
      return "uint16";
    case ffi::DataType::U32:
      return "uint32";
    case ffi::DataType::U64:
      return "uint64";
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::F64:
      return "float64";
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::C64:
      return "complex64";
    case ffi::DataType::C128:
      return "complex128";
    default:
      return "XLA type " + std::to_string(static_cast<int>(type));
  }
}

/// A shape as Python prints it: (), (8,), (2, 5, 8).
class ShapeText {
 public:
  void Append(int64_t size) {
    text_ += (count_ > 0 ? ", " : "") + std::to_string(size);
    ++count_;
  }
  std::string str() const { return "(" + text_ + (count_ == 1 ? ",)" : ")"); }

 private:
  std::string text_;
  int count_ = 0;
};

std::string Text(const Operand& x) {
  ShapeText text;
  for (int64_t size : x.buffer.dimensions()) text.Append(size);
  return text.str();
}

}  // namespace

int64_t Operand::leading_size(int64_t trailing) const {
  int64_t product = 1;
  for (int64_t axis = 0; axis < rank() - trailing; ++axis) product *= dim(axis);
  return product;
}

void Check::Fail(std::string message) {
  failed_ = true;
  message_ = std::string("zenith_") + target_ + ": " + std::move(message);
}

void Check::Float(const Operand& x) {
  if (failed_ || IsFloat(x.type())) return;
  Fail(std::string(x.name) + " must be float32, float16 or bfloat16, got " + Text(x.type()));
}

void Check::Type(const Operand& x, ffi::DataType type) {
  if (failed_ || x.type() == type) return;
  Fail(std::string(x.name) + " must be " + Text(type) + ", got " + Text(x.type()));
}

void Check::SameType(const Operand& x, const Operand& like) {
  if (failed_ || x.type() == like.type()) return;
  Fail(std::string(x.name) + " must be " + Text(like.type()) + " as " + like.name + " is, got " +
       Text(x.type()));
}

void Check::SameTypeOrF32(const Operand& x, const Operand& like) {
  if (failed_ || x.type() == like.type() || x.type() == ffi::DataType::F32) return;
  Fail(std::string(x.name) + " must be float32 or, as " + like.name + " is, " + Text(like.type()) +
       ", got " + Text(x.type()));
}

void Check::RankAtLeast(const Operand& x, int64_t rank) {
  if (failed_ || x.rank() >= rank) return;
  Fail(std::string(x.name) + " must have at least " + std::to_string(rank) + " axes, got shape " +
       Text(x));
}

void Check::Shape(const Operand& x, const Operand& like, int64_t leading,
                  std::initializer_list<int64_t> trailing) {
  if (failed_) return;
  bool same = x.rank() == leading + static_cast<int64_t>(trailing.size());
  for (int64_t axis = 0; same && axis < leading; ++axis) same = x.dim(axis) == like.dim(axis);
  int64_t axis = leading;
  for (int64_t size : trailing) same = same && x.dim(axis++) == size;
  if (same) return;

  ShapeText expected;
  for (int64_t a = 0; a < leading; ++a) expected.Append(like.dim(a));
  for (int64_t size : trailing) expected.Append(size);
  Fail(std::string(x.name) + " must have shape " + expected.str() + " to match " + like.name +
       " of shape " + Text(like) + ", got " + Text(x));
}

void Check::Same(const Operand& x, const Operand& like) {
  SameType(x, like);
  SameShape(x, like);
}

void Check::Size(const Operand& x, int64_t size, const char* why) {
  if (failed_ || x.size() == size) return;
  Fail(std::string(x.name) + " must have " + std::to_string(size) + " elements (" + why +
       "), got shape " + Text(x));
}

void Check::That(bool holds, const char* invariant, int64_t got) {
  if (failed_ || holds) return;
  Fail(std::string(invariant) + ", got " + std::to_string(got));
}

DType DTypeOf(const Operand& x) {
  switch (x.type()) {
    case ffi::DataType::F16:
      return DType::kF16;
    case ffi::DataType::BF16:
      return DType::kBF16;
    default:
      return DType::kF32;
  }
}

}  // namespace zenith
