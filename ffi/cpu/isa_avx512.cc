// The CPU kernels for AVX-512 F, BW, DQ, VL (Skylake-X, Zen 4 and newer). Flags: sources.cmake.
#define ZENITH_ISA avx512
#define ZENITH_LANES 16
#include "ffi/cpu/table.h"
