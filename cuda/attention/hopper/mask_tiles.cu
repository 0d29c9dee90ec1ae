#include <algorithm>

#include "cuda/attention/hopper/mask_tiles.cuh"
#include "cuda/attention/kernels.h"
#include "cuda/attention/score.cuh"

namespace zenith::attention::hopper {
namespace {

constexpr int kThreads = 128;
constexpr int kBlockKeys = 128, kBlockWords = kBlockKeys / 32;  // of a block; and kClassQueries
constexpr int kChunk = 16;                                      // keys that a thread packs at once
constexpr int kChunks = kBlockKeys / kChunk, kRowsAtOnce = kThreads / kChunks;

struct MaskParams {
  AttentionProblem problem;
  MaskTiles tiles;
  bool by_key;
};

/// A bit for each of four bytes of 0 or 1, the first lowest.
__device__ __forceinline__ uint32_t FourBits(uint32_t bytes) {
  return bytes * 0x01020408u >> 24;  // bit 0 of byte i to bit 24 + i; no two terms meet
}

/// The first `count` of kChunk bits.
__device__ __forceinline__ uint32_t BitsUpTo(int count) {
  return (1u << min(max(count, 0), kChunk)) - 1;
}

/// The bits of 16 keys from `key` on of a row.
template <bool kAligned>
__device__ __forceinline__ uint32_t PackChunk(const uint8_t* row, int64_t stride, int key,
                                              int keys) {
  if constexpr (kAligned) {
    if (key >= keys) return 0;
    const uint4 bytes = *reinterpret_cast<const uint4*>(row + key);
    return FourBits(bytes.x) | FourBits(bytes.y) << 4 | FourBits(bytes.z) << 8 |
           FourBits(bytes.w) << 12;
  } else {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (key + i < keys) bits |= (row[(key + i) * stride] & 1u) << i;
    return bits;
  }
}

/// A block takes 64 queries x 128 keys of a matrix. The mask crosses memory once.
template <bool kAligned>
__global__ void __launch_bounds__(kThreads)
    hopper_attention_mask_kernel(const __grid_constant__ MaskParams params) {
  __shared__ uint32_t words[kClassQueries][kBlockWords + 1];  // + 1: columns are read by lanes
  __shared__ int query_segments[kClassQueries], key_segments[kBlockKeys];
  const AttentionProblem& p = params.problem;
  const MaskTiles& tiles = params.tiles;
  const int thread = threadIdx.x, lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int s0 = static_cast<int>(blockIdx.x) * kBlockKeys;
  const int query_block = static_cast<int>(blockIdx.y) % tiles.query_blocks;
  const int64_t matrix = blockIdx.y / tiles.query_blocks;
  const int t0 = query_block * kClassQueries;
  const ScoreOffsets offsets(p, tiles.HeadOf(matrix, p));
  const int rows = min(kClassQueries, tiles.queries - t0);
  const int chunk = thread % kChunks;
  if (p.query_segments) {
    if (thread < kClassQueries)
      query_segments[thread] =
          p.query_segments[offsets.query_segments +
                           min(t0 + thread, tiles.queries - 1) * p.query_segments_strides.query];
    key_segments[thread] = p.key_segments[offsets.key_segments + min(s0 + thread, tiles.keys - 1) *
                                                                     p.key_segments_strides.key];
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kClassQueries / kRowsAtOnce; ++i) {
    const int row = i * kRowsAtOnce + thread / kChunks, s = s0 + chunk * kChunk;
    uint32_t half = row < rows ? BitsUpTo(tiles.keys - s) : 0;
    if (p.mask && half)
      half = PackChunk<kAligned>(reinterpret_cast<const uint8_t*>(p.mask) + offsets.mask +
                                     (t0 + row) * p.mask_strides.query,
                                 p.mask_strides.key, s, tiles.keys);
    if (p.interval && half) {
      const int2 keys = LoadInterval(p, offsets.interval, t0 + row);
      half &= BitsUpTo(keys.y - s) & ~BitsUpTo(keys.x - s);
    }
    if (p.query_segments)
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        if (query_segments[row] != key_segments[chunk * kChunk + j]) half &= ~(1u << j);
    const uint32_t other = __shfl_down_sync(kAllLanes, half, 1);
    if (chunk % 2 == 0) words[row][chunk / 2] = half | other << kChunk;
  }
  __syncthreads();
  {  // the class of 32 keys for each warp; what is past the end is as allowed as the rest
    const int inside = min(32, max(0, tiles.keys - s0 - 32 * warp));
    const uint32_t outside = inside == 32 ? 0 : ~0u << inside;
    uint32_t any = 0, all = ~0u;
    for (int row = lane; row < rows; row += kWarpSize)
      any |= words[row][warp], all &= words[row][warp] | outside;
    any = __reduce_or_sync(kAllLanes, any), all = __reduce_and_sync(kAllLanes, all);
    if (lane == 0)
      const_cast<uint8_t*>(
          tiles.classes)[(matrix * tiles.query_blocks + query_block) * tiles.row_words + s0 / 32 +
                         warp] =
          static_cast<uint8_t>((any ? kAnyAllowed : 0) | (all == ~0u ? kAllAllowed : 0));
  }
  if (!p.mask) return;
  for (int i = thread; i < rows * kBlockWords; i += kThreads) {
    const int row = i / kBlockWords, word = i % kBlockWords;
    const_cast<uint32_t*>(
        tiles.by_query)[(matrix * tiles.queries + t0 + row) * tiles.row_words + s0 / 32 + word] =
        words[row][word];
  }
  const int key = s0 + thread;
  if (!params.by_key || key >= tiles.keys) return;
  const auto bits_from = [&](int row) {  // of 32 queries
    uint32_t bits = 0;
#pragma unroll 8
    for (int i = 0; i < 32; ++i) bits |= (words[row + i][warp] >> lane & 1u) << i;
    return bits;
  };
  uint32_t* column =
      const_cast<uint32_t*>(tiles.by_key) + (matrix * tiles.keys + key) * tiles.column_words;
  if (tiles.queries == 1) {  // or all alike
    const uint32_t all = words[0][warp] >> lane & 1 ? ~0u : 0;
    *reinterpret_cast<uint4*>(column) = {all, all, all, all};
  } else {
    *reinterpret_cast<uint2*>(column + 2 * query_block) = {bits_from(0), bits_from(32)};
  }
}

int64_t RoundUp(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

}  // namespace

bool FindMaskTiles(const AttentionProblem& p, MaskTiles& tiles) {
  tiles = {};
  if ((!p.mask && !p.interval && !p.query_segments) || !p.mask_scratch ||
      MaskScratchWords(p) > p.mask_scratch_words ||
      reinterpret_cast<uintptr_t>(p.mask_scratch) % 16 != 0)
    return false;
  const ScoreAxes axes = MaskAxes(p);
  const int64_t batch = axes.batch ? p.batch : 1, kv_heads = axes.kv_head ? p.kv_heads : 1,
                groups = axes.group ? p.groups : 1, matrices = batch * kv_heads * groups;
  const int64_t queries = axes.query ? p.q_len : 1;
  const int64_t row_words = RoundUp(p.kv_len, 128) / 32;
  const int64_t column_words = RoundUp(queries, 128) / 32;
  const int64_t query_blocks = (queries + kClassQueries - 1) / kClassQueries;
  constexpr int64_t kMaxBlocks = 65535;  // of a grid's second axis
  if (matrices * query_blocks > kMaxBlocks) return false;
  tiles.classes = reinterpret_cast<const uint8_t*>(p.mask_scratch);
  tiles.by_query = p.mask_scratch + RoundUp(matrices * query_blocks * row_words, 16) / 4;
  tiles.by_key = tiles.by_query + matrices * queries * row_words;
  tiles.group = axes.group ? 1 : 0;
  tiles.kv_head = axes.kv_head ? static_cast<int>(groups) : 0;
  tiles.batch = axes.batch ? static_cast<int>(groups * kv_heads) : 0;
  tiles.matrices = static_cast<int>(matrices);
  tiles.queries = static_cast<int>(queries), tiles.keys = static_cast<int>(p.kv_len);
  tiles.query_blocks = static_cast<int>(query_blocks);
  tiles.row_words = static_cast<int>(row_words);
  tiles.column_words = static_cast<int>(column_words);
  return true;
}

bool MasksAlone(const AttentionProblem& p) {
  MaskTiles tiles;
  return !p.bias && p.scale > 0 && FindMaskTiles(p, tiles);
}

Status MakeMaskTiles(const AttentionProblem& p, bool by_key, const Launch& launch) {
  MaskParams params{.problem = p, .tiles = {}, .by_key = by_key};
  if (!FindMaskTiles(p, params.tiles)) return {};
  const ScoreStrides& x = p.mask_strides;
  const bool aligned = x.key == 1 && (static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.mask)) |
                                      x.batch | x.kv_head | x.group | x.query | p.kv_len) %
                                             kChunk ==
                                         0;
  const dim3 grid(static_cast<unsigned>(RoundUp(p.kv_len, kBlockKeys) / kBlockKeys),
                  static_cast<unsigned>(params.tiles.matrices * params.tiles.query_blocks));
  const auto kernel =
      aligned ? hopper_attention_mask_kernel<true> : hopper_attention_mask_kernel<false>;
  kernel<<<grid, kThreads, 0, launch.stream>>>(params);
  return LastLaunch();
}

}  // namespace zenith::attention::hopper
