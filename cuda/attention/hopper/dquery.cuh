// dquery for Hopper: a persistent block takes tiles of 64 queries a consumer warpgroup and streams
// over the keys in the band, as the forward does (forward.cuh), recomputing p from lse:
//   p = exp(scale * query . key - lse);  dlogits = p * (dout . value - delta)
//   dquery = scale * dlogits . key
// A consumer waits for its products of one tile before it issues those of the next; the tensor
// cores meanwhile work for the others. To leave dquery under way over that border was slower: ptxas
// then waits after every product (C7514) or, with fewer keys per tile, there are more of them.
// query, dout and dquery cross memory once, key and value once per query tile.
#pragma once

#include "cuda/attention/hopper/score_tiles.cuh"
#include "cuda/attention/kernels.h"

namespace zenith::attention::hopper {

/// kModified: as in forward.cuh.
template <typename T_, int kQkDim_, int kVDim_, int kConsumers_, int kCols_,
          Scores kScores_ = Scores::kPlain, int kValueStages_ = 2>
struct DqueryConfig {
  using T = T_;
  static constexpr Scores kScores = kScores_;
  static constexpr bool kModified = kScores != Scores::kPlain, kAny = kScores == Scores::kAny;
  static constexpr int kQkDim = kQkDim_, kVDim = kVDim_;  // features, padded; multiples of 32
  static constexpr int kConsumers = kConsumers_;          // warpgroups
  static constexpr int kCols = kCols_;                    // keys per tile
  // Values are done with before the last product begins: where shared memory is short, one buffer.
  static constexpr int kKeyStages = 2, kValueStages = kValueStages_;
  /// A single one is waited for when the scores are under way: with two that is 5 to 10 % slower
  /// (d64 to d128 at 4096 positions, H100, 11/2026).
  static constexpr bool kValuesLate = kValueStages == 1;
  static_assert(!(kModified && kValuesLate));
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kQueryBytes = TileBytes(kRows, kQkDim);
  static constexpr int kDoutBytes = TileBytes(kRows, kVDim);
  static constexpr int kKeyBytes = TileBytes(kCols, kQkDim);
  static constexpr int kValueBytes = TileBytes(kCols, kVDim);
  static constexpr int kBiasBytes = kAny ? BiasBytes(kRows, kCols) : 0;
  static constexpr int kBitsBytes = kModified ? kRows * BitsRowBytes(kCols) : 0;
  static constexpr int kTilesBytes = kQueryBytes + kDoutBytes + kKeyStages * kKeyBytes +
                                     kValueStages * (kValueBytes + kBiasBytes + kBitsBytes);
  static constexpr int kMessagesBytes = kModified ? (kValueStages + 1) * TileMessage::kBytes : 0;
  static constexpr int kSharedBytes =
      kTilesBytes + BarrierPair::kBytes + BarrierRing<kKeyStages>::kBytes +
      BarrierRing<kValueStages>::kBytes + kMessagesBytes + kTileAlignment;
  static constexpr int kProducerRegisters =
      kModified && kConsumers == 2 ? 40 : hopper::ProducerRegisters(kConsumers);
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

struct DqueryParams {
  CUtensorMap query, key, value, dout;
  ScoreTiles tiles;  // kModified
  AttentionBackwardArgs args;
  Schedule schedule;
};

/// Addresses in shared memory.
template <typename Config>
struct DqueryShared {
  uint32_t query, dout, keys, values, bias, bits;
  BarrierPair rows;
  BarrierRing<Config::kKeyStages> key;
  BarrierRing<Config::kValueStages> value;  // bias, bits and message come with the values
  MessageRing<Config::kValueStages> messages;

  __device__ __forceinline__ explicit DqueryShared(uint32_t base)
      : query((base + kTileAlignment - 1) & ~(kTileAlignment - 1)),
        dout(query + Config::kQueryBytes),
        keys(dout + Config::kDoutBytes),
        values(keys + Config::kKeyStages * Config::kKeyBytes),
        bias(values + Config::kValueStages * Config::kValueBytes),
        bits(bias + Config::kValueStages * Config::kBiasBytes),
        rows{query + Config::kTilesBytes},
        key{rows.end()},
        value{key.end()},
        messages{value.end()} {}
};

/// One warp, whose first lane issues the copies.
template <typename Config>
__device__ __forceinline__ void ProduceDquery(const DqueryParams& p,
                                              const DqueryShared<Config>& shared,
                                              const Band& band) {
  constexpr int kRows = Config::kRows, kCols = Config::kCols;
  constexpr bool kModified = Config::kModified;
  const int rounds = p.schedule.total_rounds();
  RingPair<Config::kKeyStages, Config::kValueStages> rings;
  const auto& key_ring = rings.first();
  const auto& value_ring = rings.second();
  uint32_t row_parity = 0;
  for (int round = 0; round < rounds; ++round) {
    const Schedule::Item item = p.schedule.At(round);
    if (item.tile < 0) continue;
    const auto tile = QueryTile<kRows, kCols>::Of(p.args, p.schedule, band, item,
                                                  kModified && !p.tiles.has_classes);
    const auto load_rows = [&] {
      BarrierExpect(shared.rows.full(), Config::kQueryBytes + Config::kDoutBytes);
      LoadTile<kRows, Config::kQkDim>(shared.query, p.query, shared.rows.full(), tile.t0, tile.head,
                                      tile.batch);
      LoadTile<kRows, Config::kVDim>(shared.dout, p.dout, shared.rows.full(), tile.t0, tile.head,
                                     tile.batch);
    };
    const auto load_key = [&](int n) {
      const uint32_t full = shared.key.full(key_ring.stage);
      BarrierWait(shared.key.empty(key_ring.stage), key_ring.parity ^ 1);
      BarrierExpect(full, Config::kKeyBytes);
      LoadTile<kCols, Config::kQkDim>(shared.keys + key_ring.stage * Config::kKeyBytes, p.key, full,
                                      n * kCols, tile.kv_head, tile.batch);
    };
    const auto load_value = [&](int n) {
      LoadTile<kCols, Config::kVDim>(shared.values + value_ring.stage * Config::kValueBytes,
                                     p.value, shared.value.full(value_ring.stage), n * kCols,
                                     tile.kv_head, tile.batch);
    };
    if constexpr (kModified) {
      const int matrix = p.tiles.has_classes ? p.tiles.mask.MatrixOf(tile.head_index(p.args)) : 0;
      TileWalk walk(tile.first, tile.count);
      const auto next = [&] {
        return walk.Next(p.tiles.has_classes, [&](int n) {
          return p.tiles.mask.Class<kRows, kCols>(matrix, tile.t0, n * kCols);
        });
      };
      TileWalk::Step step = next();
      if (threadIdx.x == 0) {
        BarrierWait(shared.rows.empty(), row_parity ^ 1);
        shared.messages.StoreAny(step.tile >= 0);
        load_rows();
      }
      row_parity ^= 1;
      for (; step.tile >= 0; rings.Advance()) {
        const int n = step.tile;
        const bool open = step.is_open;
        step = next();
        if (threadIdx.x != 0) continue;
        const uint32_t full = shared.value.full(value_ring.stage);
        const bool with_bits = p.tiles.has_bits && !open;
        load_key(n);
        BarrierWait(shared.value.empty(value_ring.stage), value_ring.parity ^ 1);
        shared.messages.Store(value_ring.stage, n, step.tile < 0, open);
        BarrierExpect(full, Config::kValueBytes +
                                (Config::kAny ? p.tiles.bias_bytes(kRows, kCols) : 0) +
                                (with_bits ? p.tiles.bits_bytes<true>(kRows, kCols) : 0));
        load_value(n);
        if (Config::kAny && p.tiles.has_bias) {
          p.tiles.LoadBias<kRows, kCols>(shared.bias + value_ring.stage * Config::kBiasBytes, full,
                                         tile.t0, n * kCols, tile.head, tile.batch);
          if (n - kBiasAhead >= tile.first)
            p.tiles.PrefetchBias<kRows, kCols>(tile.t0, (n - kBiasAhead) * kCols, tile.head,
                                               tile.batch);
        }
        if (with_bits)
          p.tiles.LoadBits<true>(shared.bits + value_ring.stage * Config::kBitsBytes, full, matrix,
                                 tile.t0, n * kCols);
      }
    } else {
      if (threadIdx.x != 0) continue;
      BarrierWait(shared.rows.empty(), row_parity ^ 1);
      row_parity ^= 1;
      load_rows();
      for (int n = tile.first + tile.count - 1; n >= tile.first; --n, rings.Advance()) {
        load_key(n);
        BarrierWait(shared.value.empty(value_ring.stage), value_ring.parity ^ 1);
        BarrierExpect(shared.value.full(value_ring.stage), Config::kValueBytes);
        load_value(n);
      }
    }
  }
}

template <typename Config>
__device__ __forceinline__ void ConsumeDquery(const DqueryParams& p,
                                              const DqueryShared<Config>& shared,
                                              const Band& band) {
  using T = typename Config::T;
  constexpr int kQkDim = Config::kQkDim, kVDim = Config::kVDim, kCols = Config::kCols;
  const int group = ConsumerIndex();
  const int warp = threadIdx.x % kWarpgroupSize / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int q_len = static_cast<int>(p.args.q_len), kv_len = static_cast<int>(p.args.kv_len);
  const bool natural = Config::kAny && p.tiles.natural;
  const float factor = p.args.scale * kLog2E;

  const uint64_t query = MatrixDescriptor(shared.query + group * 64 * kBlockRowBytes);
  const uint64_t dout = MatrixDescriptor(shared.dout + group * 64 * kBlockRowBytes);
  const uint64_t keys = MatrixDescriptor(shared.keys);
  const uint64_t values = MatrixDescriptor(shared.values);
  const uint64_t keys_by_column = MatrixDescriptor(shared.keys, kCols * kBlockRowBytes);
  float scores[kCols / 2], dp[kCols / 2], acc[kQkDim / 2];
  uint32_t dlogits[kCols / 16][4];

  const int tile_row = group * 64 + warp * 16;
  [[maybe_unused]] const BiasLane bias_lane = BiasLane::ByQuery(p.tiles, tile_row, Config::kRows);

  const int rounds = p.schedule.total_rounds();
  RingPair<Config::kKeyStages, Config::kValueStages> rings;
  const auto& key_ring = rings.first();
  const auto& value_ring = rings.second();
  uint32_t row_parity = 0;
  for (int round = 0; round < rounds; ++round) {
    const Schedule::Item item = p.schedule.At(round);
    if (item.tile < 0) continue;
    const auto tile = QueryTile<Config::kRows, kCols>::Of(p.args, p.schedule, band, item, false);
    const int t = tile.t0 + tile_row;
    // lse in units of log2, or natural and its rest in units of log2 where scores are natural; +inf
    // past the end and without an allowed key: p = 0.
    float lse[2], delta[2];
    [[maybe_unused]] float rest[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = t + lane / 4 + 8 * half;
      const int64_t index =
          (tile.batch * p.args.kv_heads * p.args.groups + tile.head) * p.args.q_len + row;
      if constexpr (Config::kModified) {
        const float2 statistics = QueryStatistics<T, true>(p.args.lse + index - row,
                                                           p.args.delta + index - row, row, q_len);
        lse[half] = statistics.x, delta[half] = statistics.y;
        rest[half] = 0;
        if constexpr (Config::kAny)
          rest[half] =
              QueryRest(p.args.lse_rest ? p.args.lse_rest + index - row : nullptr, row, q_len);
        if (!natural) lse[half] = lse[half] * kLog2E + rest[half];
      } else {
        lse[half] = row < q_len ? p.args.lse[index] * kLog2E : INFINITY;
        delta[half] = row < q_len ? p.args.delta[index] : 0.f;
      }
    }

    BarrierWait(shared.rows.full(), row_parity);
    row_parity ^= 1;
    int n = tile.first + tile.count;  // the tile of keys
    bool more = n > tile.first;
    if constexpr (Config::kModified) {
      more = shared.messages.LoadAny();
      if (!more)
#pragma unroll
        for (float& x : acc) x = 0;
    }
    for (bool accumulate = false; more; accumulate = true) {
      const uint32_t stage = value_ring.stage;
      BarrierWait(shared.key.full(key_ring.stage), key_ring.parity);
      if constexpr (!Config::kValuesLate) BarrierWait(shared.value.full(stage), value_ring.parity);
      [[maybe_unused]] TileMessage message;
      if constexpr (Config::kModified) {
        message = shared.messages.Load(stage);
        n = message.tile(), more = !message.last();
      } else {
        --n, more = n > tile.first;
      }
      FenceRegisters(scores);
      FenceRegisters(dp);
      WgmmaFence();
      MultiplyRows<T, kQkDim, Config::kRows, kCols>(
          scores, query, keys + key_ring.stage * (Config::kKeyBytes / 16));
      if constexpr (Config::kValuesLate) {
        BarrierWait(shared.value.full(stage), value_ring.parity);
        WgmmaFence();
      }
      MultiplyRows<T, kVDim, Config::kRows, kCols>(dp, dout,
                                                   values + stage * (Config::kValueBytes / 16));
      WgmmaWait<1>();
      FenceRegisters(scores);
      const bool whole = (n + 1) * kCols <= kv_len && band.HoldsAll(t, 16, n * kCols, kCols);
      if constexpr (Config::kModified)
        ApplyAll<true, Config::kScores>(scores, p.args, p.tiles, band, tile.head_index(p.args),
                                        bias_lane, shared.bias + stage * Config::kBiasBytes,
                                        shared.bits + stage * Config::kBitsBytes, message, t,
                                        n * kCols, tile_row, whole);
      else if (!whole)
        ApplyBand<true>(scores, band, t, n * kCols, kv_len);
      if (natural)
#pragma unroll
        for (int j = 0; j < kCols / 2; ++j)
          scores[j] = Exp2((scores[j] - lse[j / 2 % 2]) * kLog2E - rest[j / 2 % 2]);
      else
#pragma unroll
        for (int j = 0; j < kCols / 2; ++j) scores[j] = Exp2(scores[j] * factor - lse[j / 2 % 2]);
      WgmmaWait<0>();
      FenceRegisters(dp);
      if (Config::kModified || lane == 0)  // every lane if it read message, bias and bits
        BarrierArrive(shared.value.empty(stage));
#pragma unroll
      for (int j = 0; j < kCols / 2; ++j) {
        const float dlogit = scores[j] * (dp[j] - delta[j / 2 % 2]);
        scores[j] = Config::kModified && scores[j] == 0 ? 0.f : dlogit;  // NaN behind a mask
      }
      Pack<T>(scores, dlogits);
      FenceRegisters(acc);
      WgmmaFence();
      MultiplyColumns<T>(acc, dlogits, keys_by_column + key_ring.stage * (Config::kKeyBytes / 16),
                         accumulate);
      WgmmaWait<0>();
      FenceRegisters(acc);
      if (lane == 0) BarrierArrive(shared.key.empty(key_ring.stage));
      rings.Advance();
    }
    if (Config::kModified || lane == 0) BarrierArrive(shared.rows.empty());
    const float scale[2] = {p.args.scale, p.args.scale};
    StoreFragment(
        acc, scale,
        RowPointer(static_cast<T*>(p.args.dquery), p.args.query_strides, tile.batch, tile.head, t),
        p.args.query_strides.length, q_len - t, static_cast<int>(p.args.qk_dim));
  }
}

template <typename Config>
__global__ void __launch_bounds__(ThreadsOf(Config::kConsumers), 1)
    hopper_attention_dquery_kernel(const __grid_constant__ DqueryParams p) {
  extern __shared__ unsigned char shared_bytes[];
  const DqueryShared<Config> shared(SharedAddress(shared_bytes));
  if (threadIdx.x == 0) {
    constexpr int kReaders =
        Config::kModified ? Config::kConsumers * kWarpgroupSize : WarpsOf(Config::kConsumers);
    shared.rows.Init(kReaders);
    shared.key.Init(WarpsOf(Config::kConsumers));
    shared.value.Init(kReaders);
    BarrierInitFence();
  }
  __syncthreads();
  const Band band(p.args);
  if (threadIdx.x < kWarpgroupSize) {
    LowerRegisters<Config::kProducerRegisters>();
    if (threadIdx.x < kWarpSize) ProduceDquery<Config>(p, shared, band);
  } else {
    RaiseRegisters<ConsumerRegisters(Config::kConsumers, Config::kProducerRegisters)>();
    ConsumeDquery<Config>(p, shared, band);
  }
}

/// For problems that FitsHopper (cuda/attention.cu) admits.
template <typename Config>
Status LaunchDquery(const AttentionBackwardArgs& a, const Launch& launch) {
  DqueryParams p{
      .query = {}, .key = {}, .value = {}, .dout = {}, .tiles = {}, .args = a, .schedule = {}};
  Status status = QueryMap(a, a.query, a.query_strides, a.qk_dim, Config::kRows, p.query);
  if (status.ok()) status = QueryMap(a, a.dout, a.out_strides, a.v_dim, Config::kRows, p.dout);
  if (status.ok()) status = KeyMap(a, a.key, a.key_strides, a.qk_dim, Config::kCols, p.key);
  if (status.ok()) status = KeyMap(a, a.value, a.value_strides, a.v_dim, Config::kCols, p.value);
  if (status.ok() && Config::kModified)
    status = MakeScoreTiles<true>(a, Config::kRows, Config::kCols, p.tiles);
  if (!status.ok()) return status;
  const auto kernel = hopper_attention_dquery_kernel<Config>;
  int blocks = 0;
  status = Prepare(kernel, Config::kSharedBytes, blocks);
  if (!status.ok()) return status;
  p.schedule = ScheduleOfQueries<Config>(a, blocks);
  kernel<<<static_cast<unsigned>(blocks), ThreadsOf(Config::kConsumers), Config::kSharedBytes,
           launch.stream>>>(p);
  return LastLaunch();
}

}  // namespace zenith::attention::hopper
