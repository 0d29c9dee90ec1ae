// The launchers behind NormForward and NormBackward that have a file of their own.
#pragma once

#include "cuda/core/row_cluster.h"
#include "ffi/kernels/norm.h"

namespace zenith::norm {

/// Parameters of more bytes than the rows' elements.
template <typename T, typename P>
inline constexpr bool kIsWidened = sizeof(P) > sizeof(T);

/// Whether HopperForward has anything to gain by rows of so many vectors, and takes them: those
/// that a block's registers hold once or never, for which the general kernels have blocks of more
/// than 512 threads; where the parameters are wide, and take most of the time, the latter.
template <typename T, typename P>
constexpr bool ForwardTakes(int64_t vectors) {
  return vectors > (kIsWidened<T, P> ? 8192 : 2048) && row_cluster::Shape<4>::Fits(vectors);
}

/// Compute capability 9.0; 16-byte aligned arrays.
Status HopperForward(const NormForwardArgs& args, const Launch& launch);

/// Compute capability 9.0; 16-byte aligned arrays, and rows that long_rows::Fits.
Status HopperBackward(const NormBackwardArgs& args, const Launch& launch);

}  // namespace zenith::norm
