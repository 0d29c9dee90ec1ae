// dkey and dvalue for Hopper: a persistent block takes tiles of 64 keys a consumer warpgroup and
// streams over the queries, of each head of the group, whose band holds them:
//   p^T = exp(scale * key . query - lse);  dlogits^T = p^T * (value . dout - delta)
//   dvalue = p^T . dout;  dkey = scale * dlogits^T . query
// With keys as rows p^T and dlogits^T are, packed, the A operands of the products that follow, and
// the sums over queries stay in registers, in one order: deterministic, without atomics. The price
// is that dquery (dquery.cuh) computes p and dp again, seven products for five. key, value and the
// results cross memory once, query and dout once per tile of keys. Head sizes over 128 leave no
// registers for both accumulators: then one launch makes dkey and another dvalue.
#pragma once

#include "cuda/attention/hopper/score_tiles.cuh"
#include "cuda/attention/kernels.h"

namespace zenith::attention::hopper {

enum class Wanted { kBoth, kDkey, kDvalue };

/// kModified: as in forward.cuh.
template <typename T_, int kQkDim_, int kVDim_, int kConsumers_, int kCols_, int kStages_,
          Wanted kWanted = Wanted::kBoth, Scores kScores_ = Scores::kPlain>
struct DkeyDvalueConfig {
  using T = T_;
  static constexpr Scores kScores = kScores_;
  static constexpr bool kModified = kScores != Scores::kPlain, kAny = kScores == Scores::kAny;
  static constexpr int kQkDim = kQkDim_, kVDim = kVDim_;  // features, padded; multiples of 32
  static constexpr int kConsumers = kConsumers_;          // warpgroups
  static constexpr int kCols = kCols_;                    // queries per tile, a multiple of 32
  static constexpr int kStages = kStages_;
  static constexpr bool kDkey = kWanted != Wanted::kDvalue, kDvalue = kWanted != Wanted::kDkey;
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kKeyBytes = TileBytes(kRows, kQkDim);
  static constexpr int kValueBytes = kDkey ? TileBytes(kRows, kVDim) : 0;  // for dp alone
  static constexpr int kQueryBytes = TileBytes(kCols, kQkDim);
  static constexpr int kDoutBytes = TileBytes(kCols, kVDim);
  static constexpr int kBiasBytes = kAny ? BiasBytes(kCols, kRows) : 0;
  static constexpr int kBitsBytes = kModified ? kRows * BitsRowBytes(kCols) : 0;
  static constexpr int kTilesBytes =
      kKeyBytes + kValueBytes + kStages * (kQueryBytes + kDoutBytes + kBiasBytes + kBitsBytes);
  static constexpr int kStatisticsBytes = kStages * kCols * int{sizeof(float2)};
  static constexpr int kRestsBytes = kAny ? kStages * kCols * int{sizeof(float)} : 0;
  static constexpr int kMessagesBytes = kModified ? (kStages + 1) * TileMessage::kBytes : 0;
  static constexpr int kSharedBytes = kTilesBytes + kStatisticsBytes + kRestsBytes +
                                      BarrierPair::kBytes + BarrierRing<kStages>::kBytes +
                                      kMessagesBytes + kTileAlignment;
  static constexpr int kProducerRegisters =
      kModified ? (kQkDim > 64 ? 40 : 56) : hopper::ProducerRegisters(kConsumers);
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

struct DkeyDvalueParams {
  CUtensorMap query, key, value, dout;
  ScoreTiles tiles;  // kModified
  AttentionBackwardArgs args;
  Schedule schedule;
};

/// Addresses in shared memory.
template <typename Config>
struct DkeyDvalueShared {
  uint32_t key, value, query, dout, bias, bits;
  uint32_t
      statistics;  // of each query lse, natural if scores are, else in units of log2; and delta
  uint32_t rests;  // lse_rest of each query in units of log2
  BarrierPair rows;
  BarrierRing<Config::kStages> cols;
  MessageRing<Config::kStages> messages;

  __device__ __forceinline__ explicit DkeyDvalueShared(uint32_t base)
      : key((base + kTileAlignment - 1) & ~(kTileAlignment - 1)),
        value(key + Config::kKeyBytes),
        query(value + Config::kValueBytes),
        dout(query + Config::kStages * Config::kQueryBytes),
        bias(dout + Config::kStages * Config::kDoutBytes),
        bits(bias + Config::kStages * Config::kBiasBytes),
        statistics(key + Config::kTilesBytes),
        rests(statistics + Config::kStatisticsBytes),
        rows{rests + Config::kRestsBytes},
        cols{rows.end()},
        messages{cols.end()} {}
};

/// One warp: its first lane issues the copies, all of them fetch the statistics.
template <typename Config>
__device__ __forceinline__ void ProduceDkeyDvalue(const DkeyDvalueParams& p,
                                                  const DkeyDvalueShared<Config>& shared,
                                                  const Band& band) {
  constexpr int kRows = Config::kRows, kCols = Config::kCols, kPerLane = kCols / kWarpSize;
  constexpr bool kModified = Config::kModified;
  const int lane = threadIdx.x;
  const int q_len = static_cast<int>(p.args.q_len);
  const int groups = static_cast<int>(p.args.groups);
  const int rounds = p.schedule.total_rounds();
  Ring<Config::kStages> ring;
  uint32_t row_parity = 0;
  for (int round = 0; round < rounds; ++round) {
    const Schedule::Item item = p.schedule.At(round);
    if (item.tile < 0) continue;
    const auto tile =
        KeyTile<kRows, kCols>::Of(p.args, band, item, kModified && !p.tiles.has_classes);
    const auto load_rows = [&] {
      BarrierExpect(shared.rows.full(), Config::kKeyBytes + Config::kValueBytes);
      LoadTile<kRows, Config::kQkDim>(shared.key, p.key, shared.rows.full(), tile.s0, tile.kv_head,
                                      tile.batch);
      if constexpr (Config::kDkey)
        LoadTile<kRows, Config::kVDim>(shared.value, p.value, shared.rows.full(), tile.s0,
                                       tile.kv_head, tile.batch);
    };
    // Tile n of queries of a head. In kModified lane 0 calls `announce`, which tells of it and of
    // what comes besides.
    const auto push = [&](int n, int group, [[maybe_unused]] auto announce) {
      const int head = tile.kv_head * groups + group;
      const int64_t first_row =
          (tile.batch * p.args.kv_heads * p.args.groups + head) * p.args.q_len;
      float2 statistics[kPerLane];  // on their way while the buffer is waited for
      [[maybe_unused]] float rests[kPerLane];
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int t = n * kCols + i * kWarpSize + lane;
        if constexpr (kModified) {
          statistics[i] = QueryStatistics<typename Config::T, true>(
              p.args.lse + first_row, p.args.delta + first_row, t, q_len);
          if constexpr (Config::kAny) {
            rests[i] = QueryRest(p.args.lse_rest ? p.args.lse_rest + first_row : nullptr, t, q_len);
            if (!p.tiles.natural) statistics[i].x = statistics[i].x * kLog2E + rests[i];
          } else {
            statistics[i].x *= kLog2E;
          }
        } else {
          statistics[i] =
              t < q_len ? float2{p.args.lse[first_row + t] * kLog2E, p.args.delta[first_row + t]}
                        : float2{INFINITY, 0};  // p = 0
        }
      }
      const uint32_t full = shared.cols.full(ring.stage);
      BarrierWait(shared.cols.empty(ring.stage), ring.parity ^ 1);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i)
        StoreShared(
            shared.statistics + (ring.stage * kCols + i * kWarpSize + lane) * int{sizeof(float2)},
            statistics[i]);
      if constexpr (Config::kAny)
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
          StoreShared(
              shared.rests + (ring.stage * kCols + i * kWarpSize + lane) * int{sizeof(float)},
              rests[i]);
      if (lane == 0) {
        if constexpr (kModified) {
          announce();
        } else {
          BarrierExpect(full, Config::kQueryBytes + Config::kDoutBytes);
        }
        LoadTile<kCols, Config::kQkDim>(shared.query + ring.stage * Config::kQueryBytes, p.query,
                                        full, n * kCols, head, tile.batch);
        LoadTile<kCols, Config::kVDim>(shared.dout + ring.stage * Config::kDoutBytes, p.dout, full,
                                       n * kCols, head, tile.batch);
      } else {
        BarrierArrive(full);
      }
      ring.Advance();
    };
    if constexpr (kModified) {
      const auto matrix_of = [&](int group) {
        return p.tiles.has_classes ? p.tiles.mask.MatrixOf(tile.head_index(p.args, group)) : 0;
      };
      int next_group = 0;
      TileWalk walk(tile.first, tile.count);
      const auto next = [&] {
        for (;; ++next_group, walk = TileWalk(tile.first, tile.count)) {
          const TileWalk::Step step = walk.Next(p.tiles.has_classes, [&](int n) {
            return p.tiles.mask.Class<kCols, kRows>(matrix_of(next_group), n * kCols, tile.s0);
          });
          if (step.tile >= 0 || next_group + 1 == groups) return step;
        }
      };
      TileWalk::Step step = next();
      if (lane == 0) {
        BarrierWait(shared.rows.empty(), row_parity ^ 1);
        shared.messages.StoreAny(step.tile >= 0);
        load_rows();
      }
      row_parity ^= 1;
      while (step.tile >= 0) {
        const int n = step.tile, group = next_group;
        const bool open = step.is_open;
        step = next();
        push(n, group, [&] {
          const uint32_t full = shared.cols.full(ring.stage);
          const bool with_bits = p.tiles.has_bits && !open;
          shared.messages.Store(ring.stage, n, step.tile < 0, open, group);
          BarrierExpect(full, Config::kQueryBytes + Config::kDoutBytes +
                                  (Config::kAny ? p.tiles.bias_bytes(kCols, kRows) : 0) +
                                  (with_bits ? p.tiles.bits_bytes<false>(kRows, kCols) : 0));
          if (Config::kAny && p.tiles.has_bias) {
            const int head = tile.kv_head * groups + group;
            p.tiles.LoadBias<kCols, kRows>(shared.bias + ring.stage * Config::kBiasBytes, full,
                                           n * kCols, tile.s0, head, tile.batch);
            if (n - kBiasAhead >= tile.first)
              p.tiles.PrefetchBias<kCols, kRows>((n - kBiasAhead) * kCols, tile.s0, head,
                                                 tile.batch);
          }
          if (with_bits)
            p.tiles.LoadBits<false>(shared.bits + ring.stage * Config::kBitsBytes, full,
                                    matrix_of(group), tile.s0, n * kCols);
        });
      }
    } else {
      BarrierWait(shared.rows.empty(), row_parity ^ 1);
      row_parity ^= 1;
      if (lane == 0) load_rows();
      for (int group = 0; group < groups; ++group)
        for (int n = tile.first; n < tile.first + tile.count; ++n) push(n, group, nullptr);
    }
  }
}

template <typename Config>
__device__ __forceinline__ void ConsumeDkeyDvalue(const DkeyDvalueParams& p,
                                                  const DkeyDvalueShared<Config>& shared,
                                                  const Band& band) {
  using T = typename Config::T;
  constexpr int kQkDim = Config::kQkDim, kVDim = Config::kVDim, kCols = Config::kCols;
  const int group = ConsumerIndex();
  const int warp = threadIdx.x % kWarpgroupSize / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int kv_len = static_cast<int>(p.args.kv_len), q_len = static_cast<int>(p.args.q_len);
  const bool natural = Config::kAny && p.tiles.natural;
  const float factor = p.args.scale * kLog2E;
  const int tile_row = group * 64 + warp * 16;
  [[maybe_unused]] const BiasLane bias_lane = BiasLane::ByKey(p.tiles, tile_row, kCols);

  const uint64_t key = MatrixDescriptor(shared.key + group * 64 * kBlockRowBytes);
  const uint64_t value = MatrixDescriptor(shared.value + group * 64 * kBlockRowBytes);
  const uint64_t queries = MatrixDescriptor(shared.query);
  const uint64_t douts = MatrixDescriptor(shared.dout);
  const uint64_t queries_by_column = MatrixDescriptor(shared.query, kCols * kBlockRowBytes);
  const uint64_t douts_by_column = MatrixDescriptor(shared.dout, kCols * kBlockRowBytes);
  const uint32_t lane_statistics = shared.statistics + lane % 4 * 2 * int{sizeof(float2)};
  const uint32_t lane_rests = shared.rests + lane % 4 * 2 * int{sizeof(float)};
  float scores[kCols / 2], dp[kCols / 2], dkey[kQkDim / 2], dvalue[kVDim / 2];
  uint32_t weights[kCols / 16][4], dlogits[kCols / 16][4];

  const int rounds = p.schedule.total_rounds();
  Ring<Config::kStages> ring;
  uint32_t row_parity = 0;
  for (int round = 0; round < rounds; ++round) {
    const Schedule::Item item = p.schedule.At(round);
    if (item.tile < 0) continue;
    const auto tile = KeyTile<Config::kRows, kCols>::Of(p.args, band, item, false);
    const int s = tile.s0 + tile_row;
    int steps = tile.count * static_cast<int>(p.args.groups);
#pragma unroll
    for (float& x : dkey) x = 0;  // a key that no query sees
#pragma unroll
    for (float& x : dvalue) x = 0;
    BarrierWait(shared.rows.full(), row_parity);
    row_parity ^= 1;
    int n = tile.first;  // the tile of queries, and their head's place in the group
    [[maybe_unused]] int group = 0;
    if constexpr (Config::kModified) steps = shared.messages.LoadAny() ? 1 : 0;
    while (steps > 0) {
      const uint32_t stage = ring.stage;
      BarrierWait(shared.cols.full(stage), ring.parity);
      [[maybe_unused]] TileMessage message;
      if constexpr (Config::kModified) {
        message = shared.messages.Load(stage);
        n = message.tile(), group = shared.messages.LoadGroup(stage);
        if (message.last()) steps = 0;
      } else {
        --steps;
      }
      FenceRegisters(scores);
      if constexpr (Config::kDkey) FenceRegisters(dp);
      WgmmaFence();
      MultiplyRows<T, kQkDim, Config::kRows, kCols>(scores, key,
                                                    queries + stage * (Config::kQueryBytes / 16));
      if constexpr (Config::kDkey)
        MultiplyRows<T, kVDim, Config::kRows, kCols>(dp, value,
                                                     douts + stage * (Config::kDoutBytes / 16));
      // Of columns 8 j + 2 (lane % 4) and the next. In kModified read when used, twice: with a bias
      // there are no registers left.
      float4 statistics[kCols / 8];
      const auto load_statistics = [&](int j) {
        statistics[j] =
            LoadShared4(lane_statistics + (stage * kCols + 8 * j) * int{sizeof(float2)});
      };
      if constexpr (!Config::kModified)
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j) load_statistics(j);
      WgmmaWait<Config::kDkey ? 1 : 0>();
      FenceRegisters(scores);
      // Rows past the last key may stay: they are not stored.
      const bool whole = band.HoldsAll(n * kCols, kCols, s, 16);
      if constexpr (Config::kModified)
        ApplyAll<false, Config::kScores>(
            scores, p.args, p.tiles, band, tile.head_index(p.args, group), bias_lane,
            shared.bias + stage * Config::kBiasBytes, shared.bits + stage * Config::kBitsBytes,
            message, s, n * kCols, tile_row, whole);
      else if (!whole)
        ApplyBand<false>(scores, band, s, n * kCols, q_len);
      if (natural) {
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j) {
          load_statistics(j);
          const float2 rest =
              LoadShared2(lane_rests + (stage * kCols + 8 * j) * int{sizeof(float)});
#pragma unroll
          for (int i = 4 * j; i < 4 * j + 4; ++i)
            scores[i] =
                Exp2((scores[i] - (i % 2 == 0 ? statistics[j].x : statistics[j].z)) * kLog2E -
                     (i % 2 == 0 ? rest.x : rest.y));
        }
      } else {
#pragma unroll
        for (int i = 0; i < kCols / 2; ++i) {
          if (Config::kModified && i % 4 == 0) load_statistics(i / 4);
          scores[i] =
              Exp2(scores[i] * factor - (i % 2 == 0 ? statistics[i / 4].x : statistics[i / 4].z));
        }
      }
      if constexpr (Config::kDvalue) Pack<T>(scores, weights);
      if constexpr (Config::kDkey) {
        WgmmaWait<0>();
        FenceRegisters(dp);
      }
      if constexpr (Config::kDvalue) {
        FenceRegisters(dvalue);
        WgmmaFence();
        MultiplyColumns<T>(dvalue, weights, douts_by_column + stage * (Config::kDoutBytes / 16),
                           true);
      }
      if constexpr (Config::kDkey) {
#pragma unroll
        for (int i = 0; i < kCols / 2; ++i) {
          if (Config::kModified && i % 4 == 0) load_statistics(i / 4);
          const float dlogit =
              scores[i] * (dp[i] - (i % 2 == 0 ? statistics[i / 4].y : statistics[i / 4].w));
          scores[i] = Config::kModified && scores[i] == 0 ? 0.f : dlogit;  // NaN behind a mask
        }
        Pack<T>(scores, dlogits);
        FenceRegisters(dkey);
        WgmmaFence();
        MultiplyColumns<T>(dkey, dlogits, queries_by_column + stage * (Config::kQueryBytes / 16),
                           true);
      }
      WgmmaWait<0>();
      if constexpr (Config::kDvalue) FenceRegisters(dvalue);
      if constexpr (Config::kDkey) FenceRegisters(dkey);
      // Every lane for itself: what it read are ordinary loads, of the statistics.
      BarrierArrive(shared.cols.empty(stage));
      ring.Advance();
      if constexpr (!Config::kModified)
        if (++n == tile.first + tile.count) n = tile.first;  // the next head of the group
    }
    if (Config::kModified || lane == 0) BarrierArrive(shared.rows.empty());
    const float scale[2] = {p.args.scale, p.args.scale}, one[2] = {1, 1};
    if constexpr (Config::kDkey)
      StoreFragment(
          dkey, scale,
          RowPointer(static_cast<T*>(p.args.dkey), p.args.key_strides, tile.batch, tile.kv_head, s),
          p.args.key_strides.length, kv_len - s, static_cast<int>(p.args.qk_dim));
    if constexpr (Config::kDvalue)
      StoreFragment(dvalue, one,
                    RowPointer(static_cast<T*>(p.args.dvalue), p.args.value_strides, tile.batch,
                               tile.kv_head, s),
                    p.args.value_strides.length, kv_len - s, static_cast<int>(p.args.v_dim));
  }
}

template <typename Config>
__global__ void __launch_bounds__(ThreadsOf(Config::kConsumers), 1)
    hopper_attention_dkey_dvalue_kernel(const __grid_constant__ DkeyDvalueParams p) {
  extern __shared__ unsigned char shared_bytes[];
  const DkeyDvalueShared<Config> shared(SharedAddress(shared_bytes));
  if (threadIdx.x == 0) {
    shared.rows.Init(Config::kModified ? Config::kConsumers * kWarpgroupSize
                                       : WarpsOf(Config::kConsumers));
    shared.cols.Init(Config::kConsumers * kWarpgroupSize, kWarpSize);
    BarrierInitFence();
  }
  __syncthreads();
  const Band band(p.args);
  if (threadIdx.x < kWarpgroupSize) {
    LowerRegisters<Config::kProducerRegisters>();
    if (threadIdx.x < kWarpSize) ProduceDkeyDvalue<Config>(p, shared, band);
  } else {
    RaiseRegisters<ConsumerRegisters(Config::kConsumers, Config::kProducerRegisters)>();
    ConsumeDkeyDvalue<Config>(p, shared, band);
  }
}

/// For problems that FitsHopper (cuda/attention.cu) admits.
template <typename Config>
Status LaunchDkeyDvalue(const AttentionBackwardArgs& a, const Launch& launch) {
  DkeyDvalueParams p{
      .query = {}, .key = {}, .value = {}, .dout = {}, .tiles = {}, .args = a, .schedule = {}};
  Status status = QueryMap(a, a.query, a.query_strides, a.qk_dim, Config::kCols, p.query);
  if (status.ok()) status = QueryMap(a, a.dout, a.out_strides, a.v_dim, Config::kCols, p.dout);
  if (status.ok()) status = KeyMap(a, a.key, a.key_strides, a.qk_dim, Config::kRows, p.key);
  if (status.ok()) status = KeyMap(a, a.value, a.value_strides, a.v_dim, Config::kRows, p.value);
  if (status.ok() && Config::kModified)
    status = MakeScoreTiles<false>(a, Config::kCols, Config::kRows, p.tiles);
  if (!status.ok()) return status;
  const auto kernel = hopper_attention_dkey_dvalue_kernel<Config>;
  int blocks = 0;
  status = Prepare(kernel, Config::kSharedBytes, blocks);
  if (!status.ok()) return status;
  p.schedule = ScheduleOfKeys<Config>(a, blocks);
  kernel<<<static_cast<unsigned>(blocks), ThreadsOf(Config::kConsumers), Config::kSharedBytes,
           launch.stream>>>(p);
  return LastLaunch();
}

}  // namespace zenith::attention::hopper
