// What a block of dkey_dvalue.cuh has in shared memory, and the warp that fills it.
#pragma once

#include "cuda/attention/hopper/score_tiles.cuh"
#include "cuda/attention/kernels.h"

namespace zenith::attention::hopper {

enum class Wanted { kBoth, kDkey, kDvalue };

/// kModified: as in forward.cuh.
template <typename T_, int kQkDim_, int kVDim_, int kConsumers_, int kCols_, int kStages_,
          Wanted kWanted = Wanted::kBoth, Scores kScores_ = Scores::kPlain,
          int kDoutStages_ = kStages_>
struct DkeyDvalueConfig {
  using T = T_;
  static constexpr Scores kScores = kScores_;
  static constexpr bool kModified = kScores != Scores::kPlain, kAny = kScores == Scores::kAny;
  static constexpr int kQkDim = kQkDim_, kVDim = kVDim_;  // features, padded; multiples of 32
  static constexpr int kConsumers = kConsumers_;          // warpgroups
  static constexpr int kCols = kCols_;                    // queries per tile, a multiple of 32
  static constexpr int kStages = kStages_;                // of queries
  static constexpr int kDoutStages = kDoutStages_;
  static constexpr bool kDkey = kWanted != Wanted::kDvalue, kDvalue = kWanted != Wanted::kDkey;
  /// dout has a ring of its own: with one result, query or dout are done with early.
  static constexpr bool kApart = !(kDkey && kDvalue);
  static_assert(kApart || kDoutStages == kStages);
  /// Statistics are read when they are used, twice, where registers are few: accumulators, scores,
  /// dp, dlogits and they, but for what an iteration needs besides.
  static constexpr bool kLateStatistics =
      kModified || (!kDvalue && kQkDim / 2 + kCols * 7 / 4 > 224);
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kKeyBytes = TileBytes(kRows, kQkDim);
  static constexpr int kValueBytes = kDkey ? TileBytes(kRows, kVDim) : 0;  // for dp alone
  static constexpr int kQueryBytes = TileBytes(kCols, kQkDim);
  static constexpr int kDoutBytes = TileBytes(kCols, kVDim);
  static constexpr int kBiasBytes = kAny ? BiasBytes(kCols, kRows) : 0;
  static constexpr int kBitsBytes = kModified ? kRows * BitsRowBytes(kCols) : 0;
  static constexpr int kTilesBytes = kKeyBytes + kValueBytes +
                                     kStages * (kQueryBytes + kBiasBytes + kBitsBytes) +
                                     kDoutStages * kDoutBytes;
  static constexpr int kStatisticsBytes = kStages * kCols * int{sizeof(float2)};
  static constexpr int kRestsBytes = kAny ? kStages * kCols * int{sizeof(float)} : 0;
  static constexpr int kMessagesBytes = kModified ? (kStages + 1) * TileMessage::kBytes : 0;
  static constexpr int kSharedBytes = kTilesBytes + kStatisticsBytes + kRestsBytes +
                                      BarrierPair::kBytes + BarrierRing<kStages>::kBytes +
                                      (kApart ? BarrierRing<kDoutStages>::kBytes : 0) +
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
  uint32_t key, value, queries, douts, bias, bits;
  uint32_t
      statistics;  // of each query lse, natural if scores are, else in units of log2; and delta
  uint32_t rests;  // lse_rest of each query in units of log2
  BarrierPair rows;
  BarrierRing<Config::kStages> query;  // bias, bits, statistics and message come with the queries
  BarrierRing<Config::kDoutStages> dout;
  MessageRing<Config::kStages> messages;

  __device__ __forceinline__ explicit DkeyDvalueShared(uint32_t base)
      : key((base + kTileAlignment - 1) & ~(kTileAlignment - 1)),
        value(key + Config::kKeyBytes),
        queries(value + Config::kValueBytes),
        douts(queries + Config::kStages * Config::kQueryBytes),
        bias(douts + Config::kDoutStages * Config::kDoutBytes),
        bits(bias + Config::kStages * Config::kBiasBytes),
        statistics(key + Config::kTilesBytes),
        rests(statistics + Config::kStatisticsBytes),
        rows{rests + Config::kRestsBytes},
        query{rows.end()},
        dout{query.end()},
        messages{Config::kApart ? dout.end() : query.end()} {}
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
  RingPair<Config::kStages, Config::kDoutStages> rings;
  const auto& ring = rings.first();
  const auto& dout_ring = rings.second();
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
      const uint32_t full = shared.query.full(ring.stage);
      BarrierWait(shared.query.empty(ring.stage), ring.parity ^ 1);
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
          BarrierExpect(full, Config::kQueryBytes + (Config::kApart ? 0 : Config::kDoutBytes));
        }
        LoadTile<kCols, Config::kQkDim>(shared.queries + ring.stage * Config::kQueryBytes, p.query,
                                        full, n * kCols, head, tile.batch);
        uint32_t dout_stage = ring.stage, dout_full = full;
        if constexpr (Config::kApart) {
          dout_stage = dout_ring.stage, dout_full = shared.dout.full(dout_stage);
          BarrierWait(shared.dout.empty(dout_stage), dout_ring.parity ^ 1);
          BarrierExpect(dout_full, Config::kDoutBytes);
        }
        LoadTile<kCols, Config::kVDim>(shared.douts + dout_stage * Config::kDoutBytes, p.dout,
                                       dout_full, n * kCols, head, tile.batch);
      } else {
        BarrierArrive(full);
      }
      rings.Advance();
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
          const uint32_t full = shared.query.full(ring.stage);
          const bool with_bits = p.tiles.has_bits && !open;
          shared.messages.Store(ring.stage, n, step.tile < 0, open, group);
          BarrierExpect(full, Config::kQueryBytes + (Config::kApart ? 0 : Config::kDoutBytes) +
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

}  // namespace zenith::attention::hopper
