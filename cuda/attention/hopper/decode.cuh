// Attention forward of few queries over many keys (decoding with a cache of keys and values), by
// how fast keys and values can be read: each crosses memory once, for all query heads that share
// it. The rows of a block are up to 16 (head of the group, query) pairs, one A tile of mma.sync.
//
// The keys of a row tile are dealt out in tiles of kCols to all warps of a cluster of blocks. Each
// warp has a ring of buffers and a running softmax of its own and meets nobody on the way
// (Flash-decoding: Dao et al. 2023, crfm.stanford.edu/2023/10/12/flashdecoding). At the end the
// blocks of the cluster send each other their partial sums: no scratch in global memory, no second
// launch, and sums in one order, so bit-reproducible.
//
// TMA brings the tiles, which costs a warp a few instructions for each: the first are on their way
// before it is known which keys the rows see. Keys and values may lie in pages (kPaged): the lanes
// of a warp hold the pages of its next 32 tiles.
#pragma once

#include "cuda/attention/hopper/decode_tiles.cuh"
#include "cuda/core/cluster.cuh"

namespace zenith::attention::hopper {

/// A row of the tile: a query of one head of the group, and which keys it may see.
struct DecodeRow {
  int64_t mask, bias;  // offsets of key 0
  int begin, end;      // keys
  int segment;
};

/// `row`: of all rows of the group. Those past the last are like it.
__device__ inline DecodeRow MakeDecodeRow(const AttentionProblem& p, const Band& band,
                                          const HeadIndex& first_head, int row) {
  const int q_len = static_cast<int>(p.q_len), kv_len = static_cast<int>(p.kv_len);
  row = min(row, static_cast<int>(p.groups) * q_len - 1);
  const int group = row / q_len, t = row % q_len;
  const HeadIndex head{first_head.batch, first_head.head + group, first_head.kv_head, group};
  DecodeRow r{.mask = ScoreOffset(p.mask_strides, head) + t * p.mask_strides.query,
              .bias = ScoreOffset(p.bias_strides, head) + t * p.bias_strides.query,
              .begin = band.KeysBegin(t),
              .end = band.KeysEnd(t, 1, kv_len),
              .segment = 0};
  if (p.interval) {
    const int2 keys = LoadInterval(p, ScoreOffset(p.interval_strides, head), t);
    r.begin = max(r.begin, keys.x), r.end = min(r.end, keys.y);
  }
  if (p.query_segments)
    r.segment = p.query_segments[ScoreOffset(p.query_segments_strides, head) +
                                 t * p.query_segments_strides.query];
  return r;
}

/// scores = the 16 rows of A, whose fragments are in `a` or, where registers are short, at
/// `a_shared`, times kCols rows of B.
template <typename T, int kDim, int kCols, bool kInRegisters>
__device__ __forceinline__ void DecodeScores(
    float (&scores)[1][kCols / 8][4],
    const Operand<T, 4> (&a)[kInRegisters ? TileLayout<T, kDim>::kSteps : 1], uint32_t a_shared,
    uint32_t b) {
  using Layout = TileLayout<T, kDim>;
  using KeyLayout = DecodeLayout<T, kDim, kCols>;
  float odd[kCols / 8][4] = {};  // of odd steps: chains of dependent products half as long
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[0][n][i] = 0;
#pragma unroll
  for (int k = 0; k < Layout::kSteps; ++k) {
    Operand<T, 4> operand_a;
    if constexpr (kInRegisters)
      operand_a = a[k];
    else
      LoadMatrix4(operand_a.bits, Layout::Move(a_shared, 0, k));
#pragma unroll
    for (int n = 0; n < kCols / 16; ++n) {
      Operand<T, 4> operand_b;
      LoadMatrix4(operand_b.bits, KeyLayout::Move(b, 16 * n, k));
#pragma unroll
      for (int i = 0; i < 2; ++i)
        MultiplyAdd(k % 2 ? odd[2 * n + i] : scores[0][2 * n + i], operand_a, operand_b, i);
    }
  }
#pragma unroll
  for (int n = 0; n < kCols / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[0][n][i] += odd[n][i];
}

/// What a row's sum weighs beside one whose maximum is `max`, the larger; nothing without a key.
__device__ __forceinline__ float DecodeWeight(float own_max, float max) {
  return Exp2((own_max - (max == -INFINITY ? 0.f : max)) * kLog2E);
}

/// Grid: blocks of the cluster, row tiles of key/value heads, batch.
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    hopper_attention_decode_kernel(
        const __grid_constant__ DecodeParams<typename Config::Args> params) {
  using T = typename Config::T;
  constexpr int kDim = Config::kDim, kCols = Config::kCols, kRows = Config::kRows;
  constexpr int kWarps = Config::kWarps, kStages = Config::kStages;
  using Layout = TileLayout<T, kDim>;
  using ColumnLayout = DecodeLayout<T, kDim, kCols>;
  extern __shared__ __align__(kTileAlignment) unsigned char shared[];
  const auto& args = params.args;
  if (threadIdx.x == 0) TmaPrefetch(params.key), TmaPrefetch(params.value);
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int q_len = static_cast<int>(args.q_len), kv_len = static_cast<int>(args.kv_len);
  const int qk_dim = static_cast<int>(args.qk_dim), v_dim = static_cast<int>(args.v_dim);

  const int all_rows = static_cast<int>(args.groups) * q_len;
  HeadIndex head;  // the first of the group
  head.batch = blockIdx.z;
  head.kv_head = blockIdx.y;
  int row0 = 0;
  if (all_rows > kRows) {
    const int row_tiles = (all_rows + kRows - 1) / kRows, index = static_cast<int>(blockIdx.y);
    head.kv_head = index / row_tiles;
    row0 = index % row_tiles * kRows;
  }
  const int rows = min(kRows, all_rows - row0);
  head.head = head.kv_head * args.groups, head.group = 0;
  int64_t pool = head.batch;  // of keys and values
  const int32_t* table = nullptr;
  int page_bits = 0;  // of the tokens of a page
  if constexpr (Config::kPaged) {
    pool = blockIdx.z / static_cast<unsigned>(args.sequences);
    table =
        args.table + head.batch * args.table_batch_stride + head.kv_head * args.table_head_stride;
    page_bits = __ffs(static_cast<int>(args.page_size)) - 1;
  }
  // Each warp takes every (kWarps * blocks)-th tile, counted from the first that a row sees.
  const int stride = kWarps * blocks, own = warp * blocks + block;
  // Lane i holds the table's entries for the i-th of the 32 tiles that the warp asks for, and of
  // the 32 after them. For each stage: which of its units are of pages outside of the pool, that
  // make keys NaN.
  constexpr int kUnits = Config::kPaged ? kCols / kPageUnit : 0;
  int32_t entries[2][kUnits + 1] = {};
  uint32_t outside = 0;
  const auto load_entries = [&](int begin, int asked, int32_t (&to)[kUnits + 1]) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      // Of a unit that no row sees, the entry of the first that one does.
      const int tile = begin / kCols + own + (asked + lane) * stride;
      const int s = max(tile * kCols + u * kPageUnit, begin);
      to[u] = s < kv_len ? __ldg(table + (s >> page_bits)) : 0;
    }
  };
  if constexpr (Config::kPaged) {
    load_entries(0, 0, entries[0]);
    load_entries(0, kWarpSize, entries[1]);
  }

  const uint32_t query_tile = SharedAddress(shared);
  unsigned char* const barriers =
      shared + Config::kTilesBytes + Config::kStatisticsBytes + Config::kInboxBytes;
  DecodeRing<Config> ring(query_tile + Config::kQueryBytes + warp * Config::kWarpBytes,
                          SharedAddress(barriers) + 8 * warp * kStages);
  int begin = 0, first = 0;  // key, and its tile
  int next = own, asked = 0;
  // Asks for the warp's next tile, if it is below `end_tile`.
  const auto ask = [&](int end_tile) {
    if (next < end_tile) {
      const int s = (first + next) * kCols;
      int page[kUnits + 1] = {};
      if constexpr (Config::kPaged) {
        if (asked % kWarpSize == 0 && asked > 0) {
#pragma unroll
          for (int u = 0; u < kUnits; ++u) entries[0][u] = entries[1][u];
          load_entries(begin, asked + kWarpSize, entries[1]);
        }
        outside &= ~(((1u << kUnits) - 1) << (ring.fill_stage() * kUnits));
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const PageEntry entry =
              ReadEntry(__shfl_sync(kAllLanes, entries[0][u], asked % kWarpSize), args.pages);
          page[u] = static_cast<int>(entry.page) + static_cast<int>(pool) * params.pool_pages;
          if (entry.outside && args.nan_outside) outside |= 1u << (ring.fill_stage() * kUnits + u);
        }
        ++asked;
      }
      ring.Fill([&](uint32_t tile, uint32_t barrier) {
        const auto copy = [&](uint32_t to, const CUtensorMap& map) {
#pragma unroll
          for (int block = 0; block < kDim / kBoxFeatures; ++block) {
            const uint32_t to_block = to + block * ColumnLayout::kBlockBytes;
            const int feature = block * kBoxFeatures;
            if constexpr (Config::kPaged) {
#pragma unroll
              for (int u = 0; u < kUnits; ++u)
                TmaLoad(to_block + u * kPageUnit * kBlockRowBytes, map, barrier, feature,
                        (s + u * kPageUnit) & ((1 << page_bits) - 1),
                        static_cast<int>(head.kv_head) + static_cast<int>(pool) * params.pool_heads,
                        page[u]);
            } else {
              TmaLoad(to_block, map, barrier, feature, s, static_cast<int>(head.kv_head),
                      static_cast<int>(head.batch));
            }
          }
        };
        copy(tile, params.key);
        copy(tile + Config::kTileBytes, params.value);
      });
    }
    next += stride;
  };
  // As if rows saw keys from 0 to the last; what they do not see is thrown away.
  const bool from_zero = args.left == kUnbounded;
  if (from_zero)
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) ask((kv_len + kCols - 1) / kCols);

#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * Layout::kChunksPerRow; i += Config::kThreads) {
    const int row = i / Layout::kChunksPerRow, chunk = i % Layout::kChunksPerRow;
    const bool valid = row < rows && chunk * Layout::kChunk < qk_dim;
    const T* source = static_cast<const T*>(args.query);
    if (valid) {
      int group = row0 + row, t = 0;
      if (q_len > 1) t = group % q_len, group /= q_len;
      source = RowPointer(source, args.query_strides, head.batch, head.head + group, t) +
               chunk * Layout::kChunk;
    }
    CpAsync16(query_tile + Layout::Offset(row, chunk), source, valid);
  }
  CpAsyncCommit();

  // Keys that some row sees. Between all_begin and all_end all rows see all keys, if nothing but
  // band and intervals forbids them.
  int end = kv_len, all_begin = 0, all_end = kv_len;
  DecodeRow row_of_lane[2] = {};  // of the scores that this lane holds
  row_of_lane[0].end = row_of_lane[1].end = kv_len;
  if (Config::kScores || args.interval || args.left < kUnbounded || args.right < kUnbounded) {
    const Band band(args);
    const DecodeRow own = MakeDecodeRow(args, band, head, row0 + lane % kRows);
    const bool empty = own.begin >= own.end;
    begin = __reduce_min_sync(kAllLanes, empty ? INT_MAX : own.begin);
    end = __reduce_max_sync(kAllLanes, empty ? 0 : own.end);
    all_begin = __reduce_max_sync(kAllLanes, own.begin);
    all_end = __reduce_min_sync(kAllLanes, own.end);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const DecodeRow row = MakeDecodeRow(args, band, head, row0 + lane / 4 + 8 * half);
      (half == 0 ? row_of_lane[0] : row_of_lane[1]) = row;
    }
  }
  const int32_t* key_segments = nullptr;
  bool capped = false, plain = true;
  if constexpr (Config::kScores) {
    if (args.key_segments)
      key_segments = args.key_segments + ScoreOffset(args.key_segments_strides, head);
    capped = args.softcap > 0, plain = !args.bias && !args.mask && !key_segments;
  }
  if (begin >= end) begin = end = 0;
  first = begin / kCols;
  const int tiles = (end + kCols - 1) / kCols - first;
  if (!from_zero || first > 0) {
    ring.Drain();
    next = own, asked = 0;
    if constexpr (Config::kPaged) {
      load_entries(begin, 0, entries[0]);
      load_entries(begin, kWarpSize, entries[1]);
    }
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) ask(tiles);
  }

  // The other blocks' sums come to the inbox, and count at `arrived`.
  const int parts = rows * Config::kPartsPerRow;  // dealt out to the blocks
  const int own_parts = (parts - block + blocks - 1) / blocks;
  const int most_parts = (parts + blocks - 1) / blocks;
  unsigned char* const inbox = shared + Config::kTilesBytes + Config::kStatisticsBytes;
  float4* const inbox_sums = reinterpret_cast<float4*>(inbox);
  float2* const inbox_statistics = reinterpret_cast<float2*>(inbox_sums + Config::kMostParts);
  const uint32_t arrived = SharedAddress(barriers) + 8 * kWarps * kStages;
  if (blocks > 1) {
    if (threadIdx.x == 0) {
      BarrierInit(arrived, 1);
      BarrierInitFence();
    }
    ClusterArrive();
  }
  CpAsyncWait<0>();  // the query
  __syncthreads();
  if (blocks > 1 && threadIdx.x == 0)
    BarrierExpect(arrived, static_cast<uint32_t>(own_parts * blocks) *
                               uint32_t{sizeof(float4) + sizeof(float2)});

  const uint32_t lane_query = query_tile + Layout::LaneOffset(lane);
  Operand<T, 4> query[Config::kQueryInRegisters ? Layout::kSteps : 1];
  if constexpr (Config::kQueryInRegisters)
#pragma unroll
    for (int k = 0; k < Layout::kSteps; ++k)
      LoadMatrix4(query[k].bits, Layout::Move(lane_query, 0, k));
  const float scale = capped ? args.scale / args.softcap : args.scale;
  float acc[1][kDim / 8][4] = {};
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};  // sum: over this lane's columns
  for (int n = own; n < tiles; n += stride) {
    uint32_t tile_outside = 0;  // its units
    if constexpr (Config::kPaged)
      tile_outside = outside >> (ring.read_stage() * kUnits) & ((1u << kUnits) - 1);
    const uint32_t tile = ring.Next();
    __syncwarp();  // no lane reads the one before any more
    ask(tiles);
    const int tile_s0 = (first + n) * kCols, s0 = tile_s0 + lane % 4 * 2;
    if (tile_s0 + kCols > end) {  // of weight 0, but what lies there may be NaN
      constexpr int kChunks = kBlockRowBytes / kChunkBytes;
#pragma unroll 1
      for (int i = lane; i < kCols * kDim / kBoxFeatures * kChunks; i += kWarpSize)
        if (tile_s0 + i / kChunks % kCols >= end)
          StoreShared(tile + Config::kTileBytes + i * kChunkBytes, float4{});
      __syncwarp();
    }
    float scores[1][kCols / 8][4];
    DecodeScores<T, kDim, kCols, Config::kQueryInRegisters>(
        scores, query, lane_query, tile + ColumnLayout::Block::LaneOffsetByColumn(lane));
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[0][j][i] *= scale;
    if (Config::kScores && capped)
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[0][j][i] = args.softcap * Tanh<T>(scores[0][j][i]);
    if (!plain || tile_outside || tile_s0 < all_begin || tile_s0 + kCols > all_end)
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const DecodeRow& row = row_of_lane[i / 2];
          const int s = s0 + 8 * j + i % 2;
          float& score = scores[0][j][i];
          bool allowed = s >= row.begin && s < row.end;
          if constexpr (Config::kScores) {
            if (args.bias && allowed) score += LoadBias(args, row.bias + s * args.bias_strides.key);
            if (args.mask && allowed) allowed = args.mask[row.mask + s * args.mask_strides.key];
            if (key_segments && allowed)
              allowed = key_segments[s * args.key_segments_strides.key] == row.segment;
          }
          if constexpr (Config::kPaged)
            if (tile_outside >> (8 * j / kPageUnit) & 1) score = NAN;
          if (!allowed) score = -INFINITY;
        }
    float decay[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float row_max = max[half];
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j)
        row_max = fmaxf(row_max, fmaxf(scores[0][j][2 * half], scores[0][j][2 * half + 1]));
      row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, 1));  // a row lies in 4 lanes
      row_max = fmaxf(row_max, __shfl_xor_sync(kAllLanes, row_max, 2));
      const float shift = row_max == -INFINITY ? 0.f : row_max;  // no -inf - -inf
      decay[half] = Exp2((max[half] - shift) * kLog2E);
      max[half] = row_max;
      sum[half] *= decay[half];
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[0][j][i] = Exp2((scores[0][j][i] - shift) * kLog2E);
          sum[half] += scores[0][j][i];
        }
    }
    if (__any_sync(kAllLanes, decay[0] != 1 || decay[1] != 1))  // rare once the maximum is found
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[0][j][i] *= decay[i / 2];
    AccumulateWeighted<T, kDim, 1, kCols, ColumnLayout>(
        acc, scores, tile + Config::kTileBytes + ColumnLayout::Block::LaneOffsetOfB(lane));
  }
  ring.Drain();
  __syncwarp();

  // The warp's sums, where its buffers were, and (max, sum) of each row.
  float* partials = reinterpret_cast<float*>(shared + Config::kQueryBytes);  // of warp 0
  constexpr int kPartialStride = Config::kWarpBytes / int{sizeof(float)};
  float2* statistics = reinterpret_cast<float2*>(shared + Config::kTilesBytes);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    sum[half] += __shfl_xor_sync(kAllLanes, sum[half], 1);
    sum[half] += __shfl_xor_sync(kAllLanes, sum[half], 2);
    if (row >= rows) continue;
    if (lane % 4 == 0) statistics[warp * kRows + row] = {max[half], sum[half]};
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j)
      *reinterpret_cast<float2*>(partials + warp * kPartialStride + row * kDim + 8 * j +
                                 lane % 4 * 2) = {acc[0][j][2 * half], acc[0][j][2 * half + 1]};
  }
  __syncthreads();
  if (blocks > 1) ClusterWait();  // all have begun

  const auto finish = [&](int part, float row_max, float row_sum, float4 total) {
    const int row = part / Config::kPartsPerRow, e = part % Config::kPartsPerRow * 4;
    if (e == 0)
      WriteLse(args, FirstRow(args, head) + row0 + row, row_sum == 0, row_max, logf(row_sum));
    if (e >= v_dim) return;
    const float inverse = 1.f / row_sum;  // infinite, and out NaN, without an allowed key
    float out[4] = {total.x * inverse, total.y * inverse, total.z * inverse, total.w * inverse};
    if constexpr (Config::kPaged)
      if (row_sum == 0 && args.zero_masked_row) out[0] = out[1] = out[2] = out[3] = 0;
    if (row_sum == 0 && args.masked_row == MaskedRow::kMean) {
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        const T* const value = RowPointer(static_cast<const T*>(args.value), args.value_strides,
                                          pool, head.kv_head, 0);
        float mean = 0;
        if constexpr (Config::kPaged) {
#pragma unroll 1
          for (int s = 0; s < kv_len; ++s) {
            const PageEntry entry = ReadEntry(table[s >> page_bits], args.pages);
            const int64_t row = (s & ((1 << page_bits) - 1)) * args.value_strides.length;
            const T x = value[entry.page * args.value_page_stride + row + e + i];
            mean += entry.outside && args.nan_outside ? NAN : ToFloat(x);
          }
        } else {
#pragma unroll 8
          for (int64_t s = 0; s < kv_len; ++s)
            mean += ToFloat(value[s * args.value_strides.length + e + i]);
        }
        mean /= static_cast<float>(kv_len);
#pragma unroll
        for (int j = 0; j < 4; ++j) out[j] = i == j ? mean : out[j];
      }
    }
    int group = row0 + row, t = 0;
    if (q_len > 1) t = group % q_len, group /= q_len;
    T* const to =
        RowPointer(static_cast<T*>(args.out), args.out_strides, head.batch, head.head + group, t);
    *reinterpret_cast<uint2*>(to + e) = {PackPair<T>(out[0], out[1]), PackPair<T>(out[2], out[3])};
  };

  // The warps' sums; with one block they are the result.
#pragma unroll 1
  for (int part = threadIdx.x; part < parts; part += Config::kThreads) {
    const int row = part / Config::kPartsPerRow;
    float2 of_warp[kWarps];
    float row_max = -INFINITY, row_sum = 0;
    float4 total = {};
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      of_warp[i] = statistics[i * kRows + row];
      row_max = fmaxf(row_max, of_warp[i].x);
    }
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      const float weight = DecodeWeight(of_warp[i].x, row_max);
      const float4 sums = reinterpret_cast<const float4*>(partials + i * kPartialStride)[part];
      row_sum += weight * of_warp[i].y;
      total.x += weight * sums.x, total.y += weight * sums.y;
      total.z += weight * sums.z, total.w += weight * sums.w;
    }
    if (blocks == 1) {
      finish(part, row_max, row_sum, total);
      continue;
    }
    const int to = block * most_parts + part / blocks;
    StoreTo(part % blocks, SharedAddress(inbox_sums + to), arrived, total);
    StoreTo(part % blocks, SharedAddress(inbox_statistics + to), arrived, float2{row_max, row_sum});
  }
  if (blocks == 1) return;

  // The blocks' sums, a lane for each block.
  BarrierWait(arrived, 0);
  constexpr int kLanes = Config::kMaxCluster;
  const int from = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll 1
  for (int i = threadIdx.x / kLanes; i < (own_parts + 1) / 2 * 2; i += Config::kThreads / kLanes) {
    float2 of_block = {-INFINITY, 0};
    float4 total = {};
    if (from < blocks && i < own_parts) {
      of_block = inbox_statistics[from * most_parts + i];
      total = inbox_sums[from * most_parts + i];
    }
    const float row_max = WarpAllReduce<Max>(of_block.x, kLanes);
    const float weight = DecodeWeight(of_block.x, row_max);
    const float row_sum = WarpAllReduce<Add>(weight * of_block.y, kLanes);
    total.x = WarpAllReduce<Add>(weight * total.x, kLanes);
    total.y = WarpAllReduce<Add>(weight * total.y, kLanes);
    total.z = WarpAllReduce<Add>(weight * total.z, kLanes);
    total.w = WarpAllReduce<Add>(weight * total.w, kLanes);
    if (from == 0 && i < own_parts) finish(i * blocks + block, row_max, row_sum, total);
  }
}

}  // namespace zenith::attention::hopper
