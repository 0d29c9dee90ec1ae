// Layer and RMS normalisation, backward; the contract is ffi/kernels/norm.h.
//
// With mean = 0 and mean(g) = 0 for kRms, both kinds are
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  xhat = (x - mean) * rstd,  g = dy * scale
// and mean(g * xhat) = rstd * sum(g * (x - mean)) / cols, which needs no rstd while summing: two
// reductions of two sums each give all statistics (kRms: one).
#include "cuda/core/convert.cuh"
#include "cuda/core/device.h"
#include "cuda/core/launch.h"
#include "cuda/core/long_rows.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/rows.cuh"
#include "cuda/core/vector.cuh"
#include "cuda/norm/kernels.h"
#include "cuda/norm/statistics.cuh"

namespace zenith {
namespace {

using norm::G;
using norm::RowStatistics;

/// Writes the block's total of `sums` (one row of partials per team) for the slice's columns.
/// sPartials: (teams, cols); unused where the block is one team. Teams are added in their order.
template <int kSize, int kVectors>
__device__ __forceinline__ void StoreGroupSum(const Team& team, const RowSlice<kSize>& slice,
                                              const float (&sums)[kVectors][kSize],
                                              float* sPartials, float* gOut) {
  const bool is_alone = team.count() == 1;
  float* out = is_alone ? gOut : sPartials + team.index() * slice.cols;
  if (!is_alone) __syncthreads();  // the previous sum's partials have been read
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (slice.has(i)) StoreVector(out + slice.col(i), FromFloat<float>(sums[i]));
  }
  if (is_alone) return;
  __syncthreads();
  for (int col = threadIdx.x; col < slice.cols; col += blockDim.x) {
    float total = 0;
    for (int t = 0; t < team.count(); ++t) total += sPartials[t * slice.cols + col];
    gOut[col] = total;
  }
}

/// The most threads of a block: the accumulators alone take 2 * kVectors * kSize registers of each.
template <int kSize, int kVectors>
inline constexpr int kMaxThreads = kVectors * kSize <= 8 ? kMaxBlockThreads : kMaxBlockThreads / 2;

/// Threads of a block of several teams: 4 rows of 768 bfloat16s in flight. With 2 of them
/// 256 groups of 128 rows took 87 us, with 5 it was 68 (H100, 11/2026).
constexpr int kNarrowTeamThreads = 384;

/// One block per group, its teams take the group's rows in turn: x, dy (and dsum) are read once, dx
/// is written once, dscale and dbias stay in registers until the group is done.
template <typename T, typename P, int kSize, int kVectors>
__global__ void __launch_bounds__(kMaxThreads<kSize, kVectors>)
    norm_backward_kernel(NormBackwardArgs args, int width) {
  __shared__ TeamScratch<2> scratch;
  extern __shared__ float sPartials[];
  using Row = Vector<T, kSize>[kVectors];
  // The next row's loads fly during this row's reductions, where there are registers for both.
  constexpr bool kPrefetch = kVectors * kSize <= 8;

  Team team(width);
  const RowSlice<kSize> slice{static_cast<int>(args.cols), width, team.rank()};
  const float cols = static_cast<float>(args.cols);
  const NormRows rows = RowsOfGroup(args, blockIdx.x);
  const int64_t count = rows.end - rows.first, group_offset = rows.first * args.cols;
  const T* gX = static_cast<const T*>(args.x) + group_offset;
  const T* gDy = static_cast<const T*>(args.dy) + group_offset;
  const T* gDsum = args.dsum == nullptr ? nullptr : static_cast<const T*>(args.dsum) + group_offset;
  T* gDx = static_cast<T*>(args.dx) + group_offset;
  const P* gScale = static_cast<const P*>(args.scale);

  const auto load = [&](Row& vectors, const T* gRows, int64_t row) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (row < count && slice.has(i)) {
        vectors[i] = LoadVector<kSize>(gRows + row * args.cols + slice.col(i));
      }
    }
  };

  Vector<P, kSize> first_scale;
  if (kVectors == 1 && slice.has(0)) first_scale = LoadReadOnly<kSize>(gScale + slice.col(0));
  const auto load_scale = [&](int i, float (&values)[kSize]) {
    if constexpr (kVectors == 1) {
      ToFloat(first_scale, values);
    } else {
      ToFloat(LoadReadOnly<kSize>(gScale + slice.col(i)), values);
    }
  };

  float dscale[kVectors][kSize] = {};
  float dbias[kVectors][kSize] = {};
  Row x, dy, dsum;
  if constexpr (kPrefetch) {
    load(x, gX, team.index());
    load(dy, gDy, team.index());
  }
  // All teams make the same number of turns: those that share a warp reduce together.
  for (int64_t turn = 0; turn < count; turn += team.count()) {
    const int64_t row = turn + team.index();
    const bool active = row < count;
    Row next_x, next_dy;
    if constexpr (kPrefetch) {
      load(next_x, gX, row + team.count());
      load(next_dy, gDy, row + team.count());
    } else {
      load(x, gX, row);
      load(dy, gDy, row);
    }
    if (kPrefetch && gDsum != nullptr) load(dsum, gDsum, row);

    RowStatistics statistics = {};
    if (args.kind == NormKind::kLayer) {
      float sums[2] = {};  // of x and g
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (!active || !slice.has(i)) continue;
        float x_values[kSize], dy_values[kSize], scale[kSize];
        ToFloat(x[i], x_values);
        ToFloat(dy[i], dy_values);
        load_scale(i, scale);
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          sums[0] += x_values[j];
          sums[1] += G(dy_values[j], scale[j]);
        }
        ForgetFloats(x[i]);
        ForgetFloats(dy[i]);
      }
      team.AllReduce<Add>(sums, scratch);
      statistics.mean = sums[0] / cols;
      statistics.mean_g = sums[1] / cols;
    }

    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!active || !slice.has(i)) continue;
      float x_values[kSize], dy_values[kSize], scale[kSize];
      ToFloat(x[i], x_values);
      ToFloat(dy[i], dy_values);
      load_scale(i, scale);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float centred = x_values[j] - statistics.mean;
        sums[0] += centred * centred;
        sums[1] += G(dy_values[j], scale[j]) * centred;
      }
      ForgetFloats(x[i]);
      ForgetFloats(dy[i]);
    }
    team.AllReduce<Add>(sums, scratch);
    statistics.Finish(sums, cols, args.eps);

#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!active || !slice.has(i)) continue;
      float x_values[kSize], dy_values[kSize], scale[kSize], dx[kSize];
      ToFloat(x[i], x_values);
      ToFloat(dy[i], dy_values);
      load_scale(i, scale);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        dx[j] = statistics.dx(x_values[j], G(dy_values[j], scale[j]));
        dscale[i][j] += dy_values[j] * statistics.xhat(x_values[j]);
        dbias[i][j] += dy_values[j];
      }
      if (gDsum != nullptr) {
        if (!kPrefetch) dsum[i] = LoadVector<kSize>(gDsum + row * args.cols + slice.col(i));
        float dsum_values[kSize];
        ToFloat(dsum[i], dsum_values);
#pragma unroll
        for (int j = 0; j < kSize; ++j) dx[j] += dsum_values[j];
      }
      StoreVector(gDx + row * args.cols + slice.col(i), FromFloat<T>(dx));
    }
    if constexpr (kPrefetch) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        x[i] = next_x[i];
        dy[i] = next_dy[i];
      }
    }
  }

  const int64_t out = int64_t{blockIdx.x} * args.cols;
  StoreGroupSum(team, slice, dscale, sPartials, args.dscale + out);
  if (args.dbias != nullptr) StoreGroupSum(team, slice, dbias, sPartials, args.dbias + out);
}

/// Any number of columns: one block per group, one row at a time, x and dy read three times (kRms:
/// twice). dscale and dbias accumulate in their own float32 result: no other block touches the
/// group's, and each thread only its own columns, so no barrier is needed.
template <typename T, typename P, int kSize>
__global__ void __launch_bounds__(kMaxBlockThreads)
    norm_backward_looped_kernel(NormBackwardArgs args) {
  __shared__ TeamScratch<2> scratch;
  Team team(blockDim.x);
  const float cols = static_cast<float>(args.cols);
  const int64_t first = team.rank() * kSize;
  const int64_t step = int64_t{team.width()} * kSize;
  const P* gScale = static_cast<const P*>(args.scale);
  float* gDscale = args.dscale + int64_t{blockIdx.x} * args.cols;
  float* gDbias = args.dbias == nullptr ? nullptr : args.dbias + int64_t{blockIdx.x} * args.cols;

  const auto add_to = [](float* gOut, const float (&terms)[kSize]) {
    float values[kSize];
    ToFloat(LoadVector<kSize>(gOut), values);
#pragma unroll
    for (int j = 0; j < kSize; ++j) values[j] += terms[j];
    StoreVector(gOut, FromFloat<float>(values));
  };

  for (int64_t col = first; col < args.cols; col += step) {
    const float zeros[kSize] = {};
    StoreVector(gDscale + col, FromFloat<float>(zeros));
    if (gDbias != nullptr) StoreVector(gDbias + col, FromFloat<float>(zeros));
  }

  const NormRows rows = RowsOfGroup(args, blockIdx.x);
  for (int64_t row = rows.first; row < rows.end; ++row) {
    const int64_t offset = row * args.cols;
    const T* gX = static_cast<const T*>(args.x) + offset;
    const T* gDy = static_cast<const T*>(args.dy) + offset;
    const auto load = [&](int64_t col, float (&x)[kSize], float (&dy)[kSize],
                          float (&scale)[kSize]) {
      ToFloat(LoadVector<kSize>(gX + col), x);
      ToFloat(LoadVector<kSize>(gDy + col), dy);
      ToFloat(LoadReadOnly<kSize>(gScale + col), scale);
    };

    RowStatistics statistics = {};
    if (args.kind == NormKind::kLayer) {
      float sums[2] = {};
      for (int64_t col = first; col < args.cols; col += step) {
        float x[kSize], dy[kSize], scale[kSize];
        load(col, x, dy, scale);
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          sums[0] += x[j];
          sums[1] += G(dy[j], scale[j]);
        }
      }
      team.AllReduce<Add>(sums, scratch);
      statistics.mean = sums[0] / cols;
      statistics.mean_g = sums[1] / cols;
    }

    float sums[2] = {};
    for (int64_t col = first; col < args.cols; col += step) {
      float x[kSize], dy[kSize], scale[kSize];
      load(col, x, dy, scale);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float centred = x[j] - statistics.mean;
        sums[0] += centred * centred;
        sums[1] += G(dy[j], scale[j]) * centred;
      }
    }
    team.AllReduce<Add>(sums, scratch);
    statistics.Finish(sums, cols, args.eps);

    for (int64_t col = first; col < args.cols; col += step) {
      float x[kSize], dy[kSize], scale[kSize], dx[kSize], dy_xhat[kSize];
      load(col, x, dy, scale);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        dx[j] = statistics.dx(x[j], G(dy[j], scale[j]));
        dy_xhat[j] = dy[j] * statistics.xhat(x[j]);
      }
      if (args.dsum != nullptr) {
        float dsum[kSize];
        ToFloat(LoadVector<kSize>(static_cast<const T*>(args.dsum) + offset + col), dsum);
#pragma unroll
        for (int j = 0; j < kSize; ++j) dx[j] += dsum[j];
      }
      StoreVector(static_cast<T*>(args.dx) + offset + col, FromFloat<T>(dx));
      add_to(gDscale + col, dy_xhat);
      if (gDbias != nullptr) add_to(gDbias + col, dy);
    }
  }
}

template <typename T, typename P, int kSize, int kVectors>
Status LaunchRegisters(const NormBackwardArgs& args, const Launch& launch) {
  const RowShape shape = ShapeFor(args.cols / kSize, kVectors, kNarrowTeamThreads);
  const size_t partials_bytes =
      shape.teams == 1 ? 0 : static_cast<size_t>(shape.teams * args.cols) * sizeof(float);
  norm_backward_kernel<T, P, kSize, kVectors>
      <<<static_cast<unsigned>(args.batch * args.groups), shape.threads(), partials_bytes,
         launch.stream>>>(args, shape.width);
  return LastLaunch();
}

template <typename T, typename P, int kSize>
Status LaunchLooped(const NormBackwardArgs& args, const Launch& launch) {
  norm_backward_looped_kernel<T, P, kSize>
      <<<static_cast<unsigned>(args.batch * args.groups), kMaxBlockThreads, 0, launch.stream>>>(
          args);
  return LastLaunch();
}

/// Columns that fit the registers of one block.
template <int kSize, int kVectors>
constexpr int64_t kLongestRow = int64_t{kMaxThreads<kSize, kVectors>} * kVectors * kSize;

template <typename T, typename P>
Status LaunchAligned(const NormBackwardArgs& args, const Launch& launch) {
  constexpr int kSize = kVectorSize<T>;
  if (args.cols <= kLongestRow<kSize, 1>) return LaunchRegisters<T, P, kSize, 1>(args, launch);
#ifdef ZENITH_HOPPER
  if (long_rows::Fits(args.cols / kSize) && ChoosesHopper())
    return norm::HopperBackward(args, launch);
#endif
  if (args.cols <= kLongestRow<kSize, 4>) return LaunchRegisters<T, P, kSize, 4>(args, launch);
  return LaunchLooped<T, P, kSize>(args, launch);
}

template <typename T, typename P>
Status LaunchUnaligned(const NormBackwardArgs& args, const Launch& launch) {
  if (args.cols <= kLongestRow<1, 4>) return LaunchRegisters<T, P, 1, 4>(args, launch);
  return LaunchLooped<T, P, 1>(args, launch);
}

}  // namespace

Status NormBackward(const NormBackwardArgs& args, const Launch& launch) {
  if (args.batch == 0 || args.cols == 0) return {};  // no rows still means dscale = dbias = 0
  const bool aligned =
      AreAligned(args.x, args.scale, args.dy, args.dsum, args.dx, args.dscale, args.dbias);
  return DispatchDTypes(args.dtype, args.param_dtype, [&]<typename T, typename P>() {
    return aligned && args.cols % kVectorSize<T> == 0 ? LaunchAligned<T, P>(args, launch)
                                                      : LaunchUnaligned<T, P>(args, launch);
  });
}

}  // namespace zenith
