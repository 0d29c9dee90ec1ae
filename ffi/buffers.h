// What ffi/buffers.cc adds to the Python module _cpu.
#pragma once

#include <nanobind/nanobind.h>

namespace zenith {

void DefineBuffers(nanobind::module_& m);

}  // namespace zenith
