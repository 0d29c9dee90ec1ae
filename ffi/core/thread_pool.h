// zenith::Launch on XLA's thread pool.
#pragma once

#include "ffi/cpu/launch.h"
#include "xla/ffi/api/ffi.h"

namespace zenith {

/// A launch whose blocks are taken by the calling thread and by idle threads of `pool`, which must
/// outlive it. The caller alone finishes the work when no other thread comes to help (all may be
/// busy, or be waiting for this very call), so that it cannot deadlock.
Launch LaunchOn(::xla::ffi::ThreadPool& pool);

}  // namespace zenith
