// What ffi/exchange.cc adds to the Python module _cpu.
#pragma once

#include <nanobind/nanobind.h>

namespace zenith {

void DefineExchange(nanobind::module_& m);

}  // namespace zenith
