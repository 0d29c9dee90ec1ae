// The Python modules zenith_jax._cpu and zenith_jax._cuda: the custom-call targets as capsules and
// what Python must know of the build before it registers them. Used by zenith_jax/native.py only.
#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "ffi/core/target.h"
#include "xla/ffi/api/ffi.h"

#ifdef ZENITH_BACKEND_CUDA
#include <cuda_runtime_api.h>
#include <pthread.h>

#include <stdexcept>
#include <vector>
#define ZENITH_MODULE _cuda
#else
#include "ffi/buffers.h"
#include "ffi/cpu/dispatch.h"
#include "ffi/exchange.h"
#define ZENITH_MODULE _cpu
#endif

namespace nb = nanobind;

namespace zenith {
namespace {

#ifdef ZENITH_BACKEND_CUDA
namespace ffi = ::xla::ffi;
#endif

nb::dict Targets() {
  nb::dict capsules;
  const std::span<const Target> groups[] = {
      NormTargets(),           GroupNormTargets(),
      SoftmaxTargets(),        CrossEntropyTargets(),
      ActivationTargets(),     GatedTargets(),
      RopeTargets(),           AttentionTargets(),
      LinearTargets(),         QuantizedLinearTargets(),
      PagedAttentionTargets(),
#ifdef ZENITH_BACKEND_CUDA
      GatedLinearTargets(),
#else
      ConvTargets(),
#endif
  };
  for (std::span<const Target> group : groups) {
    for (const Target& target : group) {
      const std::string name =
          std::string("zenith_") + target.name + "_v" + std::to_string(ZENITH_KERNEL_VERSION);
      capsules[name.c_str()] = nb::capsule(reinterpret_cast<void*>(target.handler));
    }
  }
  return capsules;
}

#ifdef ZENITH_BACKEND_CUDA

/// The newest CUDA that the driver runs, as CUDA writes it: 13000 is 13.0. 0 without a driver.
int DriverVersion() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

/// Starts the driver, so the first call may take a second. Without a driver or a GPU there are no
/// devices, and `error` says why.
nb::dict DeviceInfo() {
  nb::dict info;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  (void)cudaGetLastError();  // an absent driver is an answer here, not an error to leave behind
  nb::list devices;
  for (int i = 0; error == cudaSuccess && i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    nb::dict device;
    device["name"] = nb::str(properties.name);
    device["compute_capability"] = nb::make_tuple(properties.major, properties.minor);
    device["memory_bytes"] = properties.totalGlobalMem;
    devices.append(device);
  }
  info["devices"] = devices;
  info["error"] =
      error == cudaSuccess ? nb::object(nb::none()) : nb::str(cudaGetErrorString(error));
  return info;
}

/// Writes the stream on which XLA runs its program, and the thread that launches it (pthread_self),
/// into two words each, the low one first. For who orders its own streams with XLA's:
/// zenith_jax/ops/_lower.py, compute_stream.
ffi::Error ComputeStream(cudaStream_t stream, ffi::ResultBufferR1<ffi::U32> words) {
  const uint64_t found[2] = {reinterpret_cast<uint64_t>(stream),
                             static_cast<uint64_t>(pthread_self())};
  if (words->size_bytes() != sizeof(found)) {
    return ffi::Error::InvalidArgument("zenith_compute_stream: words must have 4 elements");
  }
  // From pageable memory: the call returns when `found` has been read.
  const cudaError_t error =
      cudaMemcpyAsync(words->typed_data(), found, sizeof(found), cudaMemcpyHostToDevice, stream);
  return error == cudaSuccess ? ffi::Error::Success()
                              : ffi::Error::Internal(cudaGetErrorString(error));
}

XLA_FFI_DEFINE_HANDLER(kComputeStream, ComputeStream,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ret<ffi::BufferR1<ffi::U32>>());  // words [4]

/// The events of one thread, by device: one that two threads record means only the later one.
struct Events {
  std::vector<cudaEvent_t> of_device;

  ~Events() {
    for (cudaEvent_t event : of_device) {
      if (event != nullptr) (void)cudaEventDestroy(event);  // fails where CUDA is gone before
    }
  }
};

/// Makes what is put into `waiting` from now on wait for what is in `awaited` until now. Streams of
/// one device, as CUDA's handles.
void WaitForStream(uintptr_t waiting, uintptr_t awaited, int device) {
  if (waiting == awaited) return;
  thread_local Events events;
  int present = device;
  cudaError_t error = cudaGetDevice(&present);
  // Of handle 0 there is one in each device.
  if (error == cudaSuccess && present != device) error = cudaSetDevice(device);
  if (events.of_device.size() <= static_cast<size_t>(device)) events.of_device.resize(device + 1);
  cudaEvent_t& event = events.of_device[device];
  if (error == cudaSuccess && event == nullptr) {
    error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  }
  if (error == cudaSuccess) error = cudaEventRecord(event, reinterpret_cast<cudaStream_t>(awaited));
  if (error == cudaSuccess) {
    error = cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(waiting), event, 0);
  }
  if (present != device) (void)cudaSetDevice(present);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("a stream cannot wait for another: ") +
                             cudaGetErrorString(error));
  }
}

nb::capsule ComputeStreamTarget() { return nb::capsule(reinterpret_cast<void*>(kComputeStream)); }

#endif

}  // namespace
}  // namespace zenith

NB_MODULE(ZENITH_MODULE, m) {
  m.attr("kernel_version") = ZENITH_KERNEL_VERSION;
  m.attr("ffi_api_version") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  m.def("targets", &zenith::Targets, "Custom-call target name -> capsule of its XLA FFI handler.");
#ifndef ZENITH_BACKEND_CUDA
  nb::list instruction_sets;
  for (const zenith::CpuKernels* kernels : zenith::RunnableCpuKernels().tables) {
    if (kernels != nullptr) instruction_sets.append(kernels->isa);
  }
  m.attr("instruction_sets") = nb::tuple(instruction_sets);  // the best first, which is used
  zenith::DefineBuffers(m);
  zenith::DefineExchange(m);
#else
  m.attr("cuda_version") = CUDART_VERSION;
  m.def("driver_version", &zenith::DriverVersion,
        "Newest CUDA that the driver runs; 0: no driver.");
  m.def("device_info", &zenith::DeviceInfo, "The CUDA devices, or why there are none.");
  m.def("compute_stream_target", &zenith::ComputeStreamTarget,
        "Capsule of a handler that says on which stream XLA runs.");
  m.def("wait_for_stream", &zenith::WaitForStream, nb::arg("waiting"), nb::arg("awaited"),
        nb::arg("device"), "What comes into one stream waits for what is in another.");
#endif
}
