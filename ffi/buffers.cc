// Arrays by the memory of other frameworks' objects on the host, for zenith_jax/borrowed.py.
// Everything here holds Python's lock.
#include "ffi/buffers.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace zenith {
namespace {

/// Arrays of the memory of objects of one type that have a buffer (PEP 3118), found by address,
/// sizes and element type. For frameworks without DLPack's C interface (ffi/exchange.cc).
class Buffers {
 public:
  explicit Buffers(nb::handle type) : type_(nb::borrow(type)) {}

  nb::object Find(nb::handle object) const {
    const View view(*this, object);
    if (!view) return nb::none();
    const auto found = arrays_.find(view->buf);
    return found != arrays_.end() && found->second.Fits(*view) ? found->second.array : nb::none();
  }

  /// 0 where it has no dense buffer.
  uintptr_t Address(nb::handle object) const {
    const View view(*this, object);
    return view ? reinterpret_cast<uintptr_t>(view->buf) : 0;
  }

  void Keep(nb::handle object, nb::object array) {
    const View view(*this, object);
    if (!view) return;
    // Let go of at the end, when the map is whole again: an array that dies may give Python's lock
    // to another thread, which calls this too.
    std::unordered_map<const void*, Kept> dropped;
    if (arrays_.size() >= kMostKept) dropped.swap(arrays_);
    Kept kept{view->format == nullptr ? "B" : view->format,
              {view->shape, view->shape + view->ndim},
              std::move(array)};
    std::swap(arrays_[view->buf], kept);
  }

 private:
  struct Kept {
    std::string format;
    std::vector<Py_ssize_t> shape;
    nb::object array;

    bool Fits(const Py_buffer& view) const {
      return format == (view.format == nullptr ? "B" : view.format) &&
             shape.size() == static_cast<size_t>(view.ndim) &&
             std::equal(shape.begin(), shape.end(), view.shape);
    }
  };

  class View {
   public:
    View(const Buffers& buffers, nb::handle object) {
      if (!object.type().is(buffers.type_)) return;
      is_valid_ = PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_ND | PyBUF_FORMAT) == 0;
      if (!is_valid_) PyErr_Clear();  // its caller takes another way
    }
    View(const View&) = delete;
    ~View() {
      if (is_valid_) PyBuffer_Release(&buffer_);
    }

    explicit operator bool() const { return is_valid_; }
    const Py_buffer* operator->() const { return &buffer_; }
    const Py_buffer& operator*() const { return buffer_; }

   private:
    Py_buffer buffer_;
    bool is_valid_ = false;
  };

  static constexpr size_t kMostKept = 64;
  nb::object type_;
  std::unordered_map<const void*, Kept> arrays_;
};

}  // namespace

void DefineBuffers(nb::module_& m) {
  using nb::arg;
  nb::class_<Buffers>(m, "Buffers", "Arrays of the memory of objects of a type with a buffer.")
      .def(nb::init<nb::handle>(), arg("type"))
      .def("find", &Buffers::Find, arg("object").none(),
           "What was kept for the memory of the object, its sizes and element type; None without.")
      .def("address", &Buffers::Address, arg("object").none(),
           "Where its elements lie; 0 where it is of another type or has no dense buffer.")
      .def("keep", &Buffers::Keep, arg("object"), arg("array"));
}

}  // namespace zenith
