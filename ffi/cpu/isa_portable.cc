// The CPU kernels for whatever the compiler's baseline has (SSE2, NEON). Flags: sources.cmake.
#define ZENITH_ISA portable
#define ZENITH_LANES 4
#include "ffi/cpu/table.h"
