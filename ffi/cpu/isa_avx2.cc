// The CPU kernels for AVX2 with FMA and F16C (Haswell, Zen and newer). Flags: sources.cmake.
#define ZENITH_ISA avx2
#define ZENITH_LANES 8
#include "ffi/cpu/table.h"
