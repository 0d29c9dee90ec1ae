// Which tile, how many warps and stages serve which problem on Hopper; what each choice gave stands
// in docs/kernels/quantized_linear.md.
#pragma once

#include "cuda/quantized_linear/hopper/kernel.cuh"
#include "cuda/quantized_linear/kernels.h"

namespace zenith::quantized_linear {

constexpr int64_t kWideColumns = 96 * 128;

/// A group must be whole stages; where it is not, the general kernel.
template <typename T, typename P, typename Tile, int kTiles, int kWarps, int kStages>
Status LaunchGroups(const QuantizedLinearArgs& args, const Launch& launch) {
  if (args.groups == 1)
    return LaunchHopper<HopperConfig<T, P, Tile, kTiles, false, kWarps, kStages>>(args, launch);
  if (args.k / args.groups % Tile::kStageK != 0) return General(args, launch);
  return LaunchHopper<HopperConfig<T, P, Tile, kTiles, true, kWarps, kStages>>(args, launch);
}

/// Up to 8 rows: tiles of 128 columns, whose lines the copy engine brings twice as fast. For 16
/// they take too many registers for more than 8 warps; where a multiprocessor has a tile to itself
/// those are enough, and x is read half as often.
template <typename T, typename P>
Status LaunchRowMajor(const QuantizedLinearArgs& args, const Launch& launch) {
  const bool wide = args.n >= kWideColumns;
  if (args.bits == 8) {
    return args.rows > 8 && !wide
               ? LaunchGroups<T, P, HopperRowTile<T, 8, 64, 64>, 2, 8, 2>(args, launch)
           : args.rows > 8
               ? LaunchGroups<T, P, HopperRowTile<T, 8, 32, 128>, 2, 8, 2>(args, launch)
               : LaunchGroups<T, P, HopperRowTile<T, 8, 32, 128>, 1, 8, 2>(args, launch);
  }
  return args.rows > 8 && !wide
             ? LaunchGroups<T, P, HopperRowTile<T, 4, 64, 64>, 2, 8, 4>(args, launch)
         : args.rows > 8 ? LaunchGroups<T, P, HopperRowTile<T, 4, 64, 128>, 2, 8, 2>(args, launch)
                         : LaunchGroups<T, P, HopperRowTile<T, 4, 32, 128>, 1, 16, 2>(args, launch);
}

template <typename T, typename P>
Status LaunchColumnMajor(const QuantizedLinearArgs& args, const Launch& launch) {
  if (args.bits == 8) {
    using Tile = HopperColumnTile<T, 8>;
    return args.rows > 8 ? LaunchGroups<T, P, Tile, 2, 8, 3>(args, launch)
                         : LaunchGroups<T, P, Tile, 1, 8, 4>(args, launch);
  }
  using Tile = HopperColumnTile<T, 4>;
  return args.rows > 8            ? LaunchGroups<T, P, Tile, 2, 8, 2>(args, launch)
         : args.n >= kWideColumns ? LaunchGroups<T, P, Tile, 1, 12, 2>(args, launch)
                                  : LaunchGroups<T, P, Tile, 1, 8, 2>(args, launch);
}

template <typename T>
Status Hopper(const QuantizedLinearArgs& args, const Launch& launch) {
  if (args.param_dtype == DType::kF32) {
    return args.transposed ? LaunchColumnMajor<T, float>(args, launch)
                           : LaunchRowMajor<T, float>(args, launch);
  }
  return args.transposed ? LaunchColumnMajor<T, T>(args, launch)
                         : LaunchRowMajor<T, T>(args, launch);
}

}  // namespace zenith::quantized_linear
