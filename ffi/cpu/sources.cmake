# The CPU kernels: ZENITH_CPU_SOURCES, with the flags of each file. isa_*.cc compile the same kernels
# for one instruction set each; dispatch.cc, compiled for the baseline machine, picks at run time.
#
# -O3 in every build type: without it the micro-kernels spill all their registers.
# -fno-math-errno lets sqrt be an instruction; NaN, inf and the order of sums stay as written.
# -ffp-contract=fast fuses a * b + c across statements (g++'s default; clang's is "on").

set(_zenith_cpu_options -O3 -fno-math-errno -ffp-contract=fast)
set(ZENITH_CPU_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/dispatch.cc
    ${CMAKE_CURRENT_LIST_DIR}/isa_portable.cc)
set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/isa_portable.cc
  PROPERTIES COMPILE_OPTIONS "${_zenith_cpu_options}")

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND ZENITH_CPU_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/isa_avx2.cc
    ${CMAKE_CURRENT_LIST_DIR}/isa_avx512.cc)
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/isa_avx2.cc
    PROPERTIES COMPILE_OPTIONS "${_zenith_cpu_options};-mavx2;-mfma;-mf16c")
  set_source_files_properties(${CMAKE_CURRENT_LIST_DIR}/isa_avx512.cc
    PROPERTIES COMPILE_OPTIONS
    "${_zenith_cpu_options};-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mfma;-mf16c")
endif()
