// Rows that are longer than what a block holds, shared by the blocks of a cluster (sm_90). Each
// block has its part of a row in shared memory, brought by bulk copies while the rows before are
// worked on, so that rows cross memory once; the blocks send each other four sums a row.
//
// A row is worked on twice: Sums() when it has come, Finish() when the sums of all blocks have.
// Between the two is another row's Sums(), which hides the way of the sums:
//
//   Sums(0)  Sums(1)  Finish(0)  Sums(2)  Finish(1)  ...
#pragma once

#include "cuda/core/cluster.cuh"
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/long_rows.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/vector.cuh"

namespace zenith::long_rows {

/// Two blocks a multiprocessor, of 128 registers a thread: one loads while the other adds. Their
/// stages, and a part of the late array each, fill its shared memory.
inline constexpr int kBlocksPerSm = 2;
inline constexpr int kArrays = 2;  // of rows, that an op's sums are of
inline constexpr int kPartBytes = kPartVectors * kVectorBytes;
inline constexpr int kStageBytes = kArrays * kPartBytes;
inline constexpr int kStages = 3;     // rows in shared memory: two that are worked on, one to come
inline constexpr int kExchanges = 4;  // rows whose sums may be under way: a block may be two ahead

/// How rows are dealt out. vectors: of a row.
struct Plan {
  int64_t rows, groups;  // of each batch entry: group i has rows [rows * i / groups, ...)
  int vectors, blocks, part;

  Plan(int64_t rows, int64_t groups, int64_t row_vectors)
      : rows(rows),
        groups(groups),
        vectors(static_cast<int>(row_vectors)),
        blocks((vectors + kPartVectors - 1) / kPartVectors),
        part((vectors + blocks - 1) / blocks) {}

  /// Of the block of this rank; at least one.
  __host__ __device__ int part_of(int rank) const {
    return rank + 1 < blocks ? part : vectors - rank * part;
  }
};

/// Clusters of so many blocks that an H100 runs at once, about.
inline int Clusters(int blocks) { return 224 / blocks; }

/// What an op is launched with: its contract's arguments, and how their rows are dealt out.
template <typename Contract>
struct Args : Contract {
  Plan plan;
};

/// Sums over the block's threads, in a fixed order; all get them.
class BlockSum {
 public:
  struct Scratch {
    float2 warps[2][kThreads / kWarpSize];  // in turn, so that one barrier a sum is enough
  };
  __device__ __forceinline__ explicit BlockSum(Scratch& scratch) : scratch_(scratch) {}

  __device__ __forceinline__ float2 operator()(float2 value) {
    value.x = WarpAllReduce<Add>(value.x);
    value.y = WarpAllReduce<Add>(value.y);
    float2(&warps)[kThreads / kWarpSize] = scratch_.warps[buffer_];
    buffer_ ^= 1;
    if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    value = warps[0];
#pragma unroll
    for (int i = 1; i < kThreads / kWarpSize; ++i) value.x += warps[i].x, value.y += warps[i].y;
    return value;
  }

 private:
  Scratch& scratch_;
  int buffer_ = 0;
};

/// The part of a row that a thread works on: its vector i lies at `at(i)` of the block's part.
struct Slice {
  int vectors, first;  // of the block's part; where that begins in the row, in vectors

  __device__ __forceinline__ int at(int i) const {
    return i * kThreads + static_cast<int>(threadIdx.x);
  }
  __device__ __forceinline__ bool has(int i) const { return at(i) < vectors; }
  __device__ __forceinline__ int64_t in_row(int i) const { return first + at(i); }
};

/// An op along rows:
///
///   struct Op {
///     using Element = ...;                           // of all arrays of rows
///     using Contract = ...;                          // arguments of the kernel's contract
///     static const void* Array(const Contract&, int i);
///     static const void* Late(const Contract&);      // that only Finish reads, or null
///     Op(const Args<Contract>&, const Slice&);
///     float4 Sums(const Rows<Element>& rows, BlockSum& sum);  // calls sum() at least once
///     void Finish(const Rows<Element>& rows, const float4* sums, int64_t row);
///     void End(int64_t group);                       // after the last row
///   };
template <typename T>
struct Rows {
  static constexpr int kSize = kVectorSize<T>;
  const unsigned char *stage, *late_part;  // in shared memory

  /// body(i, values of the first array, of the second) for each of the thread's vectors.
  template <typename Body>
  __device__ __forceinline__ void ForEach(const Slice& slice, Body&& body) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!slice.has(i)) continue;
      float first[kSize], second[kSize];
      ToFloat(Load(stage, slice.at(i)), first);
      ToFloat(Load(stage + kPartBytes, slice.at(i)), second);
      body(i, first, second);
    }
  }
  __device__ __forceinline__ Vector<T, kSize> LoadLate(int vector) const {
    return Load(late_part, vector);
  }

 private:
  static __device__ __forceinline__ Vector<T, kSize> Load(const unsigned char* part, int vector) {
    return LoadVector<kSize>(reinterpret_cast<const T*>(part) + vector * kSize);
  }
};

template <typename Op>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    long_rows_kernel(const __grid_constant__ Args<typename Op::Contract> args) {
  const Plan& plan = args.plan;
  extern __shared__ __align__(
      128) unsigned char sStages[];  // and behind them the late array's part
  __shared__ __align__(16) float4 sSums[kExchanges][kMaxBlocks];
  __shared__ uint64_t sFull[kStages], sLateFull, sExchanged[kExchanges];
  __shared__ BlockSum::Scratch scratch;

  const int rank = static_cast<int>(ClusterRank());
  const int64_t group = blockIdx.x / plan.blocks;
  const int64_t before = group / plan.groups * plan.rows, in_batch = group % plan.groups;
  const int64_t first_row = before + plan.rows * in_batch / plan.groups;
  const int count = static_cast<int>(before + plan.rows * (in_batch + 1) / plan.groups - first_row);
  const Slice slice{plan.part_of(rank), rank * plan.part};
  const uint32_t bytes = static_cast<uint32_t>(slice.vectors) * kVectorBytes;
  const auto full = [&](int n) { return SharedAddress(&sFull[n % kStages]); };
  const auto exchanged = [&](int n) { return SharedAddress(&sExchanged[n % kExchanges]); };
  const uint32_t late_full = SharedAddress(&sLateFull);
  const bool has_late = Op::Late(args) != nullptr;
  const bool leads = threadIdx.x == 0;

  const auto in_memory = [&](const void* gArray, int n) {
    const int64_t vector = (first_row + n) * plan.vectors + slice.first;
    return static_cast<const unsigned char*>(gArray) + vector * kVectorBytes;
  };
  const auto fetch = [&](int n) {
    if (n >= count) return;
    BarrierExpect(full(n), kArrays * bytes);
#pragma unroll
    for (int i = 0; i < kArrays; ++i) {
      BulkLoad(SharedAddress(sStages) + n % kStages * kStageBytes + i * kPartBytes,
               in_memory(Op::Array(args, i), n), bytes, full(n));
    }
  };
  const auto fetch_late = [&](int n) {
    if (!has_late || n >= count) return;
    BarrierExpect(late_full, bytes);
    BulkLoad(SharedAddress(sStages) + kStages * kStageBytes, in_memory(Op::Late(args), n), bytes,
             late_full);
  };

  if (leads) {
    for (int i = 0; i < kStages; ++i) BarrierInit(full(i), 1);
    for (int i = 0; i < kExchanges; ++i) BarrierInit(exchanged(i), 1);
    BarrierInit(late_full, 1);
    BarrierInitFence();
    for (int i = 0; i < kStages; ++i) fetch(i);
    fetch_late(0);
  }
  __syncthreads();
  ClusterArrive();
  Op op(args, slice);
  BlockSum sum(scratch);
  ClusterWait();  // all blocks' barriers are there

  const auto rows = [&](int n) {
    return Rows<typename Op::Element>{sStages + n % kStages * kStageBytes,
                                      sStages + kStages * kStageBytes};
  };
  const auto begin = [&](int n) {
    BarrierWait(full(n), n / kStages & 1);
    const float4 sums = op.Sums(rows(n), sum);
    // All threads have met since they finished row n - 2, whose stage and late part are free.
    if (leads) {
      if (n >= 2) {
        fetch(n - 2 + kStages);
        fetch_late(n - 1);
      }
      BarrierExpect(exchanged(n), static_cast<uint32_t>(plan.blocks) * sizeof(float4));
    }
    if (static_cast<int>(threadIdx.x) < plan.blocks) {
      StoreTo(threadIdx.x, SharedAddress(&sSums[n % kExchanges][rank]), exchanged(n), sums);
    }
  };
  const auto finish = [&](int n) {
    BarrierWait(exchanged(n), n / kExchanges & 1);
    if (has_late) BarrierWait(late_full, n & 1);
    op.Finish(rows(n), sSums[n % kExchanges], first_row + n);
  };
  if (count > 0) begin(0);
  for (int n = 0; n + 1 < count; ++n) {
    begin(n + 1);
    finish(n);
  }
  if (count > 0) {
    if (has_late && count > 1) {
      __syncthreads();
      if (leads) fetch_late(count - 1);
    }
    finish(count - 1);
  }
  op.End(group);
}

/// For each of `batch * plan.groups` groups of rows a cluster.
template <typename Op>
Status LaunchLongRows(const typename Op::Contract& args, const Plan& plan, int64_t batch,
                      const Launch& launch) {
  constexpr int kStagesBytes = kStages * kStageBytes;
  const auto kernel = long_rows_kernel<Op>;
  // The most, whatever this launch needs: another thread's may come between.
  cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, kStagesBytes + kPartBytes);
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(batch * plan.groups * plan.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kStagesBytes + (Op::Late(args) == nullptr ? 0 : kPartBytes);
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, Args<typename Op::Contract>{args, plan});
  return error == cudaSuccess ? Status{} : Status{cudaGetErrorString(error)};
}

}  // namespace zenith::long_rows
