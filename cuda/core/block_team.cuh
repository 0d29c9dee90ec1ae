// Threads of a block that work on one row (cuda/core/reduce.cuh), as cuda/core/cluster_team.cuh has
// those of a cluster.
#pragma once

#include "cuda/core/reduce.cuh"

namespace zenith {

/// `width` threads of a block.
class BlockTeam {
 public:
  using Scratch = TeamScratch<1>;
  __device__ __forceinline__ BlockTeam(int width, Scratch& scratch)
      : team_(width), scratch_(scratch) {}

  __device__ __forceinline__ int64_t row() const {
    return int64_t{blockIdx.x} * team_.count() + team_.index();
  }
  __device__ __forceinline__ int rank() const { return team_.rank(); }

  /// All threads of the warps concerned call it, those without a row too.
  template <typename Op>
  __device__ __forceinline__ float AllReduce(float value) {
    return team_.AllReduce<Op>(value, scratch_);
  }

 private:
  Team team_;
  Scratch& scratch_;
};

}  // namespace zenith
