# The CUDA module: cuda/*.cu behind the handlers that the CPU module has. Static CUDA runtime and no
# link to libcuda: the module imports on a machine without a driver.
find_program(NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
if(NVCC AND NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER ${NVCC})
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # CMake knows no "90a": the flags below say it
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
  message(FATAL_ERROR "zenith: CUDA 12.0 or newer is needed, nvcc is ${CMAKE_CUDA_COMPILER_VERSION}")
endif()
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

set(gencode)
list(GET ZENITH_CUDA_ARCHS 0 ptx_arch)
foreach(arch IN LISTS ZENITH_CUDA_ARCHS)
  list(APPEND gencode "SHELL:-gencode arch=compute_${arch},code=sm_${arch}")
endforeach()
if(NOT ptx_arch MATCHES "[a-z]$")  # code for "90a" runs on that architecture only: no use as PTX
  list(APPEND gencode "SHELL:-gencode arch=compute_${ptx_arch},code=compute_${ptx_arch}")
endif()

file(GLOB_RECURSE cuda_sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/cuda/*.cu)
set(hopper_sources ${cuda_sources})
list(FILTER hopper_sources INCLUDE REGEX "/hopper/")
list(FILTER cuda_sources EXCLUDE REGEX "/hopper/")
set(nvcc_warnings --expt-relaxed-constexpr
    "SHELL:-Xcompiler=-Wall,-Wextra$<$<BOOL:${ZENITH_WERROR}>:,-Werror>"
    "$<$<BOOL:${ZENITH_WERROR}>:SHELL:-Werror all-warnings>")
set(nvcc_options ${gencode} ${nvcc_warnings})
zenith_kernels(zenith_cuda_kernels ${cuda_sources})
target_compile_options(zenith_cuda_kernels PRIVATE ${nvcc_options})
set(cuda_kernels zenith_cuda_kernels)
if("90a" IN_LIST ZENITH_CUDA_ARCHS)  # wgmma and TMA: for that architecture only
  zenith_kernels(zenith_cuda_hopper_kernels ${hopper_sources})
  target_compile_options(zenith_cuda_hopper_kernels PRIVATE
                         "SHELL:-gencode arch=compute_90a,code=sm_90a" ${nvcc_warnings})
  target_compile_definitions(zenith_cuda_kernels PRIVATE ZENITH_HOPPER)
  list(APPEND cuda_kernels zenith_cuda_hopper_kernels)
endif()

zenith_handlers(zenith_cuda_handlers ffi/gated_linear.cc)  # on a CPU: gated.cc behind products
target_compile_definitions(zenith_cuda_handlers PRIVATE ZENITH_BACKEND_CUDA)
target_include_directories(zenith_cuda_handlers SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
zenith_module(_cuda ${cuda_kernels} zenith_cuda_handlers CUDA::cudart_static)
target_compile_definitions(_cuda PRIVATE ZENITH_BACKEND_CUDA)
target_include_directories(_cuda SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})

if(ZENITH_CUDA_TESTS)
  add_subdirectory(tests/cuda)
endif()
