// The threads of all blocks of a cluster, on one row (sm_90). The blocks send each other what each
// has reduced.
#pragma once

#include "cuda/core/cluster.cuh"
#include "cuda/core/reduce.cuh"
#include "cuda/core/row_cluster.h"

namespace zenith {

/// `width` threads: those of all blocks of the cluster, whole warps of each.
class ClusterTeam {
 public:
  /// In turn: a block that sends its next result has had all others' of this reduction, which they
  /// sent after they had read those of the one before.
  static constexpr int kBuffers = 2;
  struct Scratch {
    float warps[kBuffers][kMaxWarps];
    float2 blocks[kBuffers][row_cluster::kMaxBlocks];  // 8 bytes are the least a block sends
    uint64_t arrived[kBuffers];
  };

  __device__ __forceinline__ ClusterTeam(int width, Scratch& scratch)
      : blocks_(width / static_cast<int>(blockDim.x)), scratch_(scratch) {
    if (threadIdx.x == 0) {
      for (uint64_t& arrived : scratch.arrived) BarrierInit(SharedAddress(&arrived), 1);
      BarrierInitFence();
    }
    __syncwarp();  // the first thread has made the barriers before it arrives
    ClusterArrive();
  }

  __device__ __forceinline__ int64_t row() const { return blockIdx.x / blocks_; }
  __device__ __forceinline__ int rank() const {
    return static_cast<int>(ClusterRank() * blockDim.x + threadIdx.x);
  }

  /// All threads of the cluster call it. The order of the sums is fixed.
  template <typename Op>
  __device__ __forceinline__ float AllReduce(float value) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int thread = static_cast<int>(threadIdx.x), buffer = reduction_ % kBuffers;
    float (&warps)[kMaxWarps] = scratch_.warps[buffer];
    float2(&blocks)[row_cluster::kMaxBlocks] = scratch_.blocks[buffer];
    const uint32_t arrived = SharedAddress(&scratch_.arrived[buffer]);
    value = WarpAllReduce<Op>(value);
    if (lane == 0) warps[warp] = value;
    if (reduction_ == 0) ClusterWait();  // every block's barriers are there
    __syncthreads();
    if (warp == 0) {
      value = lane < static_cast<int>(blockDim.x) / kWarpSize ? warps[lane] : Op::kIdentity;
      value = WarpAllReduce<Op>(value);
      if (lane == 0) BarrierExpect(arrived, static_cast<uint32_t>(blocks_) * sizeof(float2));
      if (thread < blocks_) {
        StoreTo(threadIdx.x, SharedAddress(&blocks[ClusterRank()]), arrived, float2{value, 0});
      }
    }
    BarrierWait(arrived, reduction_ / kBuffers & 1);
    value = blocks[0].x;
    for (int i = 1; i < blocks_; ++i) value = Op::Apply(value, blocks[i].x);
    ++reduction_;
    return value;
  }

 private:
  int blocks_, reduction_ = 0;
  Scratch& scratch_;
};

}  // namespace zenith
