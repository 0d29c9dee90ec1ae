// How group norm's blocks share a sample, and their sums. Channels are last in memory.
//
// A slab, the channels of some whole groups that make up whole 16-byte vectors, is one cluster's:
// its blocks take the rows in equal parts and exchange sums through their shared memories. So
// nothing is left in global memory between the sums and the result, and a block that has its part
// in shared memory reads it from global memory once. On devices without clusters one block takes
// the slab.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>
#include <numeric>

#include "cuda/core/convert.cuh"
#include "cuda/core/cp_async.cuh"
#include "cuda/core/launch.h"
#include "cuda/core/reduce.cuh"
#include "cuda/core/vector.cuh"
#include "ffi/kernels/group_norm.h"

namespace zenith::group_norm {

inline constexpr int kThreads = 256;

/// The shape as launched. Sizes of a slab are those of all but the last, which may be narrower.
struct Tiling {
  int groups, channels;    // of a sample; of a group
  int slab_groups, slabs;  // of a slab; of a sample
  int rows, block_rows;    // of a sample; of a block, but for the cluster's last ones
  int kept_rows;           // of a block, in shared memory
  int cluster;             // blocks

  __host__ __device__ int width() const { return groups * channels; }
  __host__ __device__ int slab_width() const { return slab_groups * channels; }
  __device__ int rows_of(int block) const {
    const int left = rows - block * block_rows;
    return left < 0 ? 0 : left < block_rows ? left : block_rows;
  }
};

/// What a thread of a block works on: one vector of channels, of every `step`-th row.
template <int kSize>
struct Slab {
  int sample, rank;            // of the block in its cluster
  int first_group, groups;     // of the slab
  int width, vectors;          // channels and vectors of it
  int rows, step, first, col;  // of the block; of this thread the first row, or `rows`
  int64_t offset;              // of the thread's vector in the block's first row

  __device__ __forceinline__ explicit Slab(const Tiling& tiling) {
    const int slab_index = static_cast<int>(blockIdx.x) / tiling.cluster;
    rank = static_cast<int>(blockIdx.x) % tiling.cluster;
    sample = slab_index / tiling.slabs;
    first_group = slab_index % tiling.slabs * tiling.slab_groups;
    groups = min(tiling.slab_groups, tiling.groups - first_group);
    width = groups * tiling.channels;
    vectors = width / kSize;
    rows = tiling.rows_of(rank);
    step = kThreads / vectors;
    const int row = static_cast<int>(threadIdx.x) / vectors;
    first = row < step ? row : rows;
    col = static_cast<int>(threadIdx.x) % vectors * kSize;
    offset = (int64_t{sample} * tiling.rows + int64_t{rank} * tiling.block_rows) * tiling.width() +
             first_group * tiling.channels + col;
  }

  /// Of this thread's channel `i` in the sample.
  __device__ __forceinline__ int channel(const Tiling& tiling, int i) const {
    return first_group * tiling.channels + col + i;
  }
  /// Its group in the slab.
  __device__ __forceinline__ int group(const Tiling& tiling, int i) const {
    return (col + i) / tiling.channels;
  }
  /// How many of the block's first `below` rows are this thread's.
  __device__ __forceinline__ int turns(int below) const {
    return first < below ? (below - first + step - 1) / step : 0;
  }
  __device__ __forceinline__ int row(int turn) const { return first + turn * step; }
  /// Where row `row` of this thread is kept: no other thread touches it.
  __device__ __forceinline__ int kept(int row) const { return row * vectors + col / kSize; }
};

/// A vector from global to shared memory. All of a thread's are under way at once, in no register.
template <typename T, int kSize>
__device__ __forceinline__ void Fetch(Vector<T, kSize>* to, const T* gFrom) {
  if constexpr (Vector<T, kSize>::kBytes == kVectorBytes) {
    CpAsync16(SharedAddress(to), gFrom, true);
  } else {
    *to = LoadReadOnly<kSize>(gFrom);
  }
}

/// Calls fetch(turn) for all turns, then use(turn) for each quarter of them as it has arrived.
template <typename FetchOne, typename Use>
__device__ __forceinline__ void Stream(int turns, FetchOne&& fetch, Use&& use) {
  const int bounds[] = {0, turns / 4, turns / 2, turns - turns / 4, turns};
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    for (int turn = bounds[part]; turn < bounds[part + 1]; ++turn) fetch(turn);
    CpAsyncCommit();
  }
  const auto use_part = [&](int part) {
#pragma unroll 2
    for (int turn = bounds[part]; turn < bounds[part + 1]; ++turn) use(turn);
  };
  CpAsyncWait<3>();
  use_part(0);
  CpAsyncWait<2>();
  use_part(1);
  CpAsyncWait<1>();
  use_part(2);
  CpAsyncWait<0>();
  use_part(3);
}

/// The block's part of shared memory for sums: `partials` (kThreads * kSize), `few`, of at least
/// kThreads and of a slab's channels.
struct SumScratch {
  float *partials, *few;

  template <int kSize>
  __host__ __device__ static int Floats(int slab_width) {
    return kThreads * kSize + FewFloats(slab_width);
  }
  __host__ __device__ static int FewFloats(int slab_width) {
    return slab_width > kThreads ? slab_width : kThreads;
  }
};

/// few[p * width + channel]: sums of `values`, one for each channel of each thread, over some of
/// the threads' rows each. The number of p. The order of the sums is fixed.
template <int kSize>
__device__ __forceinline__ int SumRows(const Slab<kSize>& slab, const float (&values)[kSize],
                                       const SumScratch& scratch) {
  __syncthreads();  // the previous sums have been read
  if (static_cast<int>(threadIdx.x) < slab.step * slab.vectors) {
    StoreVector(scratch.partials + threadIdx.x * kSize, FromFloat<float>(values));
  }
  __syncthreads();
  const int width = slab.width, parts = width < kThreads ? kThreads / width : 1;
  for (int i = static_cast<int>(threadIdx.x); i < parts * width; i += kThreads) {
    const int part = i / width;
    float sum = 0;
    for (int row = part; row < slab.step; row += parts) {
      sum += scratch.partials[row * width + i - part * width];
    }
    scratch.few[i] = sum;
  }
  __syncthreads();
  return parts;
}

/// out[group] = the sum of all `few` of a group's channels.
template <int kSize>
__device__ __forceinline__ void SumGroups(const Slab<kSize>& slab, int channels, int parts,
                                          const float* few, float* out) {
  const int terms = parts * channels;
  int lanes = 1;  // of a group
  while (lanes < terms && lanes < kWarpSize) lanes *= 2;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int turns = (slab.groups * lanes + kThreads - 1) / kThreads;
  for (int turn = 0; turn < turns; ++turn) {  // whole warps, for the shuffles
    const int group = (turn * kThreads + static_cast<int>(threadIdx.x)) / lanes;
    float sum = 0;
    if (group < slab.groups) {
      for (int i = lane; i < terms; i += lanes) {
        const int part = i / channels;
        sum += few[part * slab.width + group * channels + i - part * channels];
      }
    }
    sum = WarpAllReduce<Add>(sum, lanes);
    if (lane == 0 && group < slab.groups) out[group] = sum;
  }
  __syncthreads();
}

/// The cluster's barriers and shared memories; of a lone block where there are no clusters.
struct Exchange {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();

  __device__ __forceinline__ void Sync() { cluster.sync(); }
  __device__ __forceinline__ const float* Of(int block, float* own) {
    return cluster.map_shared_rank(own, block);
  }
  /// After the last read of others' memory, and before the block's end.
  __device__ __forceinline__ void Done() { cluster.barrier_arrive(); }
  __device__ __forceinline__ void WaitForOthers() { cluster.barrier_wait(); }
#else
  __device__ __forceinline__ void Sync() { __syncthreads(); }
  __device__ __forceinline__ const float* Of(int, float* own) { return own; }
  __device__ __forceinline__ void Done() {}
  __device__ __forceinline__ void WaitForOthers() {}
#endif
};

/// A parameter's element; of two possible types, so that kernels are compiled for one.
template <typename T>
__device__ __forceinline__ float Parameter(const void* gValues, bool is_float, int i) {
  return is_float ? static_cast<const float*>(gValues)[i]
                  : ToFloat(static_cast<const T*>(gValues)[i]);
}

// ---- Launch -------------------------------------------------------------------------------------

/// Shared memory that lets two blocks share a multiprocessor, whose loads then overlap the other's
/// sums.
inline constexpr int kWantedBytes = 96 * 1024;
inline constexpr int kMaxCluster = 16;  // more than the portable 8: Hopper has them

struct Device {
  int processors = 0, shared_bytes = 0;
  bool has_clusters = false;
  cudaError_t error;

  Device() {
    int device = 0, major = 0, minor = 0;
    error = cudaGetDevice(&device);
    const auto read = [&](int& value, cudaDeviceAttr attribute) {
      if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
    };
    read(processors, cudaDevAttrMultiProcessorCount);
    read(shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    read(major, cudaDevAttrComputeCapabilityMajor);
    read(minor, cudaDevAttrComputeCapabilityMinor);
#ifdef ZENITH_HOPPER
    has_clusters = major == 9 && minor == 0;  // others run the code for sm_80, which has none
#endif
  }
};

/// Slabs of 64 bytes and more, so that memory's sectors of 32 are used whole; narrower ones where a
/// cluster would not keep its rows, or leave multiprocessors idle. Clusters that keep their rows
/// and fill the device. `arrays`: how many are kept. sums_bytes(slab_width): shared memory for
/// sums.
template <int kSize, typename SumsBytes>
Tiling TilingFor(const GroupNormShape& shape, const Device& device, int itemsize, int arrays,
                 SumsBytes sums_bytes) {
  Tiling tiling{};
  tiling.groups = static_cast<int>(shape.groups);
  tiling.channels = static_cast<int>(shape.channels);
  tiling.rows = static_cast<int>(shape.rows);
  const int unit = std::lcm(tiling.channels, kSize) / tiling.channels;  // groups of whole vectors
  const int most = std::max(1, kThreads * kSize / (unit * tiling.channels));
  const int max_cluster = device.has_clusters ? kMaxCluster : 1;
  const int enough_blocks = device.processors * 3 / 2;
  const auto bytes = [&](int units) { return units * unit * tiling.channels * itemsize; };
  const auto is_too_wide = [&](int units) {
    const int64_t slabs = (tiling.groups + units * unit - 1) / (units * unit);
    const int64_t block_rows = (tiling.rows + max_cluster - 1) / max_cluster;
    return block_rows * bytes(units) * arrays > kWantedBytes ||
           shape.samples * slabs * max_cluster < enough_blocks;
  };
  int units = 1;
  while (units < most && units * unit < tiling.groups && (bytes(units) < 64 || bytes(units) % 32)) {
    ++units;
  }
  while (units > 1 && bytes(units / 2) >= 32 && is_too_wide(units)) units /= 2;
  tiling.slab_groups = std::min(units * unit, tiling.groups);
  tiling.slabs = (tiling.groups + tiling.slab_groups - 1) / tiling.slab_groups;

  const int row_bytes = tiling.slab_width() * itemsize * arrays;
  const int64_t slabs = shape.samples * tiling.slabs;
  const int step = kThreads / std::max(1, tiling.slab_width() / kSize);
  tiling.cluster = 1;
  while (tiling.cluster < max_cluster && tiling.rows > 4 * tiling.cluster * step &&
         (int64_t{tiling.rows} * row_bytes > tiling.cluster * int64_t{kWantedBytes} ||
          slabs * tiling.cluster < enough_blocks)) {
    tiling.cluster *= 2;
  }
  tiling.block_rows = (tiling.rows + tiling.cluster - 1) / tiling.cluster;
  const int left = device.shared_bytes - sums_bytes(tiling.slab_width());
  tiling.kept_rows = std::min(tiling.block_rows, std::max(0, left) / std::max(1, row_bytes));
  return tiling;
}

template <typename Args>
Status Launch(void (*kernel)(Args, Tiling), const Args& args, const Device& device,
              const Tiling& tiling, size_t shared_bytes, cudaStream_t stream) {
  // The most, whatever this launch needs: another thread's may come between.
  cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
  if (error == cudaSuccess && tiling.cluster > 8) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) return {cudaGetErrorString(error)};
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(tiling.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(args.shape.samples * tiling.slabs * tiling.cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = tiling.cluster > 1 ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, args, tiling);
  return error == cudaSuccess ? Status{} : Status{cudaGetErrorString(error)};
}

/// What the kernels do not take.
inline Status Unsupported(const GroupNormShape& shape, int vector_size) {
  if (!shape.channels_last) return {"on a GPU x must have its channels last"};
  constexpr int64_t kMax = 0x7fffffff;
  if (shape.rows > kMax || shape.width() > kMax || shape.samples * shape.width() > kMax / 8) {
    return {"rows, channels and samples * channels must be below 2^28"};
  }
  if (std::lcm(shape.channels, int64_t{vector_size}) > int64_t{kThreads} * vector_size) {
    return {"a group's channels must fit a block's 256 vectors"};
  }
  return {};
}

}  // namespace zenith::group_norm
