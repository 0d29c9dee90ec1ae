// How many blocks decode.cuh's kernel gets for a problem, and its launch.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "cuda/attention/hopper/decode.cuh"
#include "cuda/attention/paged.h"

namespace zenith::attention::hopper {

/// Maps of keys and values for boxes of `rows`.
inline Status MakeDecodeMaps(const AttentionForwardArgs& a, int rows,
                             DecodeParams<AttentionForwardArgs>& params) {
  const Status status = KeyMap(a, a.key, a.key_strides, a.qk_dim, rows, params.key);
  return status.ok() ? KeyMap(a, a.value, a.value_strides, a.v_dim, rows, params.value) : status;
}
/// Pools' pages are counted through, or their heads where these lie outside of the pages.
inline Status MakeDecodeMaps(const PagedAttentionArgs& a, int,
                             DecodeParams<PagedAttentionArgs>& params) {
  const int64_t pools = a.batch / a.sequences;
  const bool by_page = PoolsByPage(a);
  params.pool_pages = by_page ? static_cast<int>(a.pages) : 0;
  params.pool_heads = by_page ? 0 : static_cast<int>(a.kv_heads);
  const auto make = [&](const void* base, const HeadStrides& strides, int64_t page,
                        int64_t features, CUtensorMap& map) {
    return MakeTensorMap(
        {a.dtype, base, a.pages * (by_page ? pools : 1), a.kv_heads * (by_page ? 1 : pools),
         a.page_size, features, page, strides.head, strides.length},
        kPageUnit, map);
  };
  const Status status = make(a.key, a.key_strides, a.key_page_stride, a.qk_dim, params.key);
  return status.ok() ? make(a.value, a.value_strides, a.value_page_stride, a.v_dim, params.value)
                     : status;
}

/// For problems that FitsTensorCores (cuda/attention.cu) admits, of 16-bit types. `cluster`: blocks
/// of a key/value head.
template <typename Config>
Status LaunchDecode(const typename Config::Args& args, int cluster, const Launch& launch) {
  DecodeParams<typename Config::Args> params{
      .key = {}, .value = {}, .pool_pages = 0, .pool_heads = 0, .args = args};
  const Status status = MakeDecodeMaps(args, Config::kCols, params);
  if (!status.ok()) return status;
  const auto kernel = hopper_attention_decode_kernel<Config>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           Config::kSharedBytes);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return Status{cudaGetErrorString(error)};
  const int64_t row_tiles = (args.groups * args.q_len + Config::kRows - 1) / Config::kRows;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>(cluster), static_cast<unsigned>(args.kv_heads * row_tiles),
           static_cast<unsigned>(args.batch));
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = Config::kSharedBytes;
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, params);
  return error == cudaSuccess ? LastLaunch() : Status{cudaGetErrorString(error)};
}

/// How many clusters of each size the device runs at once. Asked for once: the devices of a process
/// are taken to be alike.
template <typename Config>
const std::array<int, Config::kMaxCluster + 1>& DecodeClusters() {
  static const auto clusters = [] {
    std::array<int, Config::kMaxCluster + 1> most = {};
    const auto kernel = hopper_attention_decode_kernel<Config>;
    (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Config::kSharedBytes);
    (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    for (unsigned size = 1; size <= Config::kMaxCluster; ++size) {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {size, 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(size);
      config.blockDim = dim3(Config::kThreads);
      config.dynamicSmemBytes = Config::kSharedBytes;
      config.attrs = &attribute;
      config.numAttrs = 1;
      if (cudaOccupancyMaxActiveClusters(&most[size], kernel, &config) != cudaSuccess) {
        most[size] = 0;
        (void)cudaGetLastError();
      }
    }
    return most;
  }();
  return clusters;
}

/// Clusters of 16 rows of a key/value head, of so many that all multiprocessors have work.
template <typename T, int kDim, int kCols, int kBlocksPerSm, bool kScores, typename Args>
Status DecodeRows(const Args& args, const Launch& launch) {
  constexpr bool kPaged = std::is_same_v<Args, PagedAttentionArgs>;
  constexpr int kStages = 3;
  using Narrow = DecodeConfig<T, kDim, kCols, kStages, 4, kBlocksPerSm, kScores, kPaged>;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return Status{cudaGetErrorString(error)};
  const int64_t row_tiles = (args.groups * args.q_len + Narrow::kRows - 1) / Narrow::kRows;
  const int64_t items = args.batch * args.kv_heads * row_tiles;

  // With few items a block a multiprocessor of twice the warps, in the largest clusters that run
  // all at once: half of the multiprocessors read as fast as memory sends, and where two clusters
  // share theirs they end last (four warps with six stages: 28.0 us for b1 16384 where eight with
  // three take 27.4, and 2 % less for 131072). Two tiles a warp at least. Past 8, where a GPC holds
  // one, any size; below, powers of two: b1 16384 took 25.8 us with 9 for 27.5 with 8, b4 8192 54
  // with 3 for 50 with 2.
  if constexpr (kDim <= 128 && !kScores) {
    using Wide = DecodeConfig<T, kDim, kCols, kStages, 8, 1, kScores, kPaged>;
    const auto& at_once = DecodeClusters<Wide>();
    const auto fits = [&](int size) {
      return at_once[size] >= items && args.kv_len >= size * 2 * Wide::kWarps * kCols;
    };
    int size = Wide::kMaxCluster;
    while (size > 1 && !fits(size)) size = size > 8 ? size - 1 : size / 2;
    if (at_once[size] >= items) return LaunchDecode<Wide>(args, size, launch);
  }

  // The cluster with which the device works through all keys soonest, a block a multiprocessor at a
  // time, if it gains a tenth: blocks cost some time each. Two tiles a warp at least.
  const int64_t most = args.kv_len / (2 * Narrow::kWarps * Narrow::kCols);
  int64_t cluster = 1, rounds = (items + processors - 1) / processors;
  for (int64_t c = 2; c <= std::min<int64_t>(most, Narrow::kMaxCluster); c *= 2) {
    const int64_t rounds_of_c = (items * c + processors - 1) / processors;
    if (10 * rounds_of_c * cluster < 9 * rounds * c) cluster = c, rounds = rounds_of_c;
  }
  return LaunchDecode<Narrow>(args, static_cast<int>(cluster), launch);
}

// 24 or 32 KiB of buffers a warp, and with two blocks a multiprocessor about 128 KiB on their way:
// at 3 TB/s a multiprocessor is sent 25 KiB while one read is answered.
template <typename T, bool kScores, typename Args>
Status DecodeByHead(const Args& args, const Launch& launch) {
  const int64_t dim = std::max(args.qk_dim, args.v_dim);
  return dim <= 64    ? DecodeRows<T, 64, 32, 2, kScores>(args, launch)
         : dim <= 128 ? DecodeRows<T, 128, 16, 2, kScores>(args, launch)
                      : DecodeRows<T, 256, 16, 1, kScores>(args, launch);
}

}  // namespace zenith::attention::hopper
