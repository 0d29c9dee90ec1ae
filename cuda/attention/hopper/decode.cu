#include "cuda/attention/hopper/decode.cuh"

namespace zenith::attention::hopper {
namespace {

constexpr int kStages = 3;

/// Clusters of 16 rows of a key/value head, of so many that all multiprocessors have work.
template <typename T, int kDim, int kCols, int kBlocksPerSm, bool kScores>
Status DecodeRows(const AttentionForwardArgs& args, const Launch& launch) {
  using Narrow = DecodeConfig<T, kDim, kCols, kStages, 4, kBlocksPerSm, kScores>;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return Status{cudaGetErrorString(error)};
  const int64_t row_tiles = (args.groups * args.q_len + Narrow::kRows - 1) / Narrow::kRows;
  const int64_t items = args.batch * args.kv_heads * row_tiles;

  // With few items a block a multiprocessor of twice the warps, in the largest clusters that run
  // all at once: half of the multiprocessors read as fast as memory sends, and where two clusters
  // share theirs they end last. Two tiles a warp at least. Past 8, where a GPC holds one, any size;
  // below, powers of two: b1 16384 took 25.8 us with 9 for 27.5 with 8, b4 8192 54 with 3 for 50
  // with 2.
  if constexpr (kDim <= 128 && !kScores) {
    using Wide = DecodeConfig<T, kDim, kCols, kStages, 8, 1, kScores>;
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
template <typename T, bool kScores>
Status DecodeByHead(const AttentionForwardArgs& args, const Launch& launch) {
  const int64_t dim = std::max(args.qk_dim, args.v_dim);
  return dim <= 64    ? DecodeRows<T, 64, 32, 2, kScores>(args, launch)
         : dim <= 128 ? DecodeRows<T, 128, 16, 2, kScores>(args, launch)
                      : DecodeRows<T, 256, 16, 1, kScores>(args, launch);
}

template <typename T>
Status DecodeByScores(const AttentionForwardArgs& args, const Launch& launch) {
  return args.bias || args.mask || args.query_segments || args.softcap > 0
             ? DecodeByHead<T, true>(args, launch)
             : DecodeByHead<T, false>(args, launch);
}

}  // namespace

Status Decode(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? DecodeByScores<__half>(args, launch)
                                   : DecodeByScores<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::attention::hopper
