// The back end that a handler source is compiled for. Every ffi/X.cc is compiled twice, once for
// the CPU and once with ZENITH_BACKEND_CUDA for CUDA; this header is the only place that knows
// which.
#pragma once

#include <cstdint>
#include <exception>
#include <initializer_list>
#include <string>
#include <utility>

#include "ffi/kernels/types.h"
#include "xla/ffi/api/ffi.h"

#ifdef ZENITH_BACKEND_CUDA
#include "cuda/core/launch.h"
#else
#include "ffi/core/large_pages.h"
#include "ffi/core/thread_pool.h"
#include "ffi/cpu/launch.h"
#endif

namespace zenith {

namespace ffi = ::xla::ffi;

#ifdef ZENITH_BACKEND_CUDA

/// What a handler binds with .Ctx<Place>() and receives as its first argument, `Context`.
using Place = ffi::PlatformStream<cudaStream_t>;
using Context = cudaStream_t;

/// Every launcher is capture-safe (cuda/core/launch.h), so XLA may put the call into a CUDA graph.
inline constexpr std::initializer_list<ffi::Traits> kTraits = {ffi::Traits::kCmdBufferCompatible};

inline Launch MakeLaunch(Context& stream) { return Launch{stream}; }

inline void BeforeWrites(void*, int64_t) {}

#else

using Place = ffi::ThreadPool;
using Context = ffi::ThreadPool;

inline constexpr std::initializer_list<ffi::Traits> kTraits = {};

/// `pool` must outlive the launch.
inline Launch MakeLaunch(Context& pool) { return LaunchOn(pool); }

/// Of each result of a call.
inline void BeforeWrites(void* data, int64_t bytes) { UseLargePages(data, bytes); }

#endif

/// Calls `kernel(launch)`; what it reports, or throws, becomes an error that names `target`. No
/// exception may reach XLA, which is compiled without them.
template <typename Kernel>
ffi::Error Run(const char* target, Context& context, Kernel&& kernel) {
  try {
    const Status status = std::forward<Kernel>(kernel)(MakeLaunch(context));
    if (status.ok()) return ffi::Error::Success();
    return ffi::Error::Internal(std::string("zenith_") + target + ": " + status.message);
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string("zenith_") + target + ": " + error.what());
  } catch (...) {
    return ffi::Error::Internal(std::string("zenith_") + target + ": unknown exception");
  }
}

}  // namespace zenith
