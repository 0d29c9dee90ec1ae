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

#include "cuda/attention/hopper/fragment.cuh"
#include "cuda/attention/hopper/pipeline.cuh"
#include "cuda/attention/kernels.h"

namespace zenith::attention::hopper {

enum class Wanted { kBoth, kDkey, kDvalue };

/// kModified: as in forward.cuh.
template <typename T_, int kQkDim_, int kVDim_, int kConsumers_, int kCols_, int kStages_,
          Wanted kWanted = Wanted::kBoth, bool kModified_ = false>
struct DkeyDvalueConfig {
  using T = T_;
  static constexpr bool kModified = kModified_;
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
  static constexpr int kTilesBytes = kKeyBytes + kValueBytes + kStages * (kQueryBytes + kDoutBytes);
  static constexpr int kStatisticsBytes = kStages * kCols * int{sizeof(float2)};
  static constexpr int kRestsBytes = kModified ? kStages * kCols * int{sizeof(float)} : 0;
  static constexpr int kSharedBytes = kTilesBytes + kStatisticsBytes + kRestsBytes +
                                      BarrierPair::kBytes + BarrierRing<kStages>::kBytes +
                                      kTileAlignment;
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

struct DkeyDvalueParams {
  CUtensorMap query, key, value, dout;
  AttentionBackwardArgs args;
  Schedule schedule;
};

/// Addresses in shared memory.
template <typename Config>
struct DkeyDvalueShared {
  uint32_t key, value, query, dout;
  uint32_t statistics;  // of each query lse, natural in kModified, else in units of log2; and delta
  uint32_t rests;       // lse_rest of each query in units of log2
  BarrierPair rows;
  BarrierRing<Config::kStages> cols;

  __device__ __forceinline__ explicit DkeyDvalueShared(uint32_t base)
      : key((base + kTileAlignment - 1) & ~(kTileAlignment - 1)),
        value(key + Config::kKeyBytes),
        query(value + Config::kValueBytes),
        dout(query + Config::kStages * Config::kQueryBytes),
        statistics(key + Config::kTilesBytes),
        rests(statistics + Config::kStatisticsBytes),
        rows{rests + Config::kRestsBytes},
        cols{rows.end()} {}
};

/// One warp: its first lane issues the copies, all of them fetch the statistics.
template <typename Config>
__device__ __forceinline__ void ProduceDkeyDvalue(const DkeyDvalueParams& p,
                                                  const DkeyDvalueShared<Config>& shared,
                                                  const Band& band) {
  constexpr int kCols = Config::kCols, kPerLane = kCols / kWarpSize;
  const int lane = threadIdx.x;
  const int q_len = static_cast<int>(p.args.q_len), groups = static_cast<int>(p.args.groups);
  const int rounds = p.schedule.total_rounds();
  Ring<Config::kStages> ring;
  uint32_t row_parity = 0;
  for (int round = 0; round < rounds; ++round) {
    const Schedule::Item item = p.schedule.At(round);
    if (item.tile < 0) continue;
    const auto tile =
        KeyTile<Config::kRows, kCols>::template Of<Config::kModified>(p.args, band, item);
    BarrierWait(shared.rows.empty(), row_parity ^ 1);
    row_parity ^= 1;
    if (lane == 0) {
      BarrierExpect(shared.rows.full(), Config::kKeyBytes + Config::kValueBytes);
      LoadTile<Config::kRows, Config::kQkDim>(shared.key, p.key, shared.rows.full(), tile.s0,
                                              tile.kv_head, tile.batch);
      if constexpr (Config::kDkey)
        LoadTile<Config::kRows, Config::kVDim>(shared.value, p.value, shared.rows.full(), tile.s0,
                                               tile.kv_head, tile.batch);
    }
    for (int group = 0; group < groups; ++group) {
      const int head = tile.kv_head * groups + group;
      const int64_t first_row =
          (tile.batch * p.args.kv_heads * p.args.groups + head) * p.args.q_len;
      for (int n = tile.first; n < tile.first + tile.count; ++n, ring.Advance()) {
        float2 statistics[kPerLane];  // on their way while the buffer is waited for
        [[maybe_unused]] float rests[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
          const int t = n * kCols + i * kWarpSize + lane;
          if constexpr (Config::kModified) {
            statistics[i] = QueryStatistics<typename Config::T, true>(
                p.args.lse + first_row, p.args.delta + first_row, t, q_len);
            rests[i] = QueryRest(p.args.lse_rest ? p.args.lse_rest + first_row : nullptr, t, q_len);
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
        if constexpr (Config::kModified)
#pragma unroll
          for (int i = 0; i < kPerLane; ++i)
            StoreShared(
                shared.rests + (ring.stage * kCols + i * kWarpSize + lane) * int{sizeof(float)},
                rests[i]);
        if (lane == 0) {
          BarrierExpect(full, Config::kQueryBytes + Config::kDoutBytes);
          LoadTile<kCols, Config::kQkDim>(shared.query + ring.stage * Config::kQueryBytes, p.query,
                                          full, n * kCols, head, tile.batch);
          LoadTile<kCols, Config::kVDim>(shared.dout + ring.stage * Config::kDoutBytes, p.dout,
                                         full, n * kCols, head, tile.batch);
        } else {
          BarrierArrive(full);
        }
      }
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
  const float factor = p.args.scale * kLog2E;

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
    const auto tile =
        KeyTile<Config::kRows, kCols>::template Of<Config::kModified>(p.args, band, item);
    ScoreOffsets offsets(p.args, tile.first_head(p.args));
    const int s = tile.s0 + group * 64 + warp * 16;
    const int steps = tile.count * static_cast<int>(p.args.groups);
#pragma unroll
    for (float& x : dkey) x = 0;  // a key that no query sees
#pragma unroll
    for (float& x : dvalue) x = 0;
    BarrierWait(shared.rows.full(), row_parity);
    row_parity ^= 1;
    int n = tile.first;
    for (int step = 0; step < steps; ++step) {
      const uint32_t stage = ring.stage;
      BarrierWait(shared.cols.full(stage), ring.parity);
      FenceRegisters(scores);
      if constexpr (Config::kDkey) FenceRegisters(dp);
      WgmmaFence();
      MultiplyRows<T, kQkDim, Config::kRows, kCols>(scores, key,
                                                    queries + stage * (Config::kQueryBytes / 16));
      if constexpr (Config::kDkey)
        MultiplyRows<T, kVDim, Config::kRows, kCols>(dp, value,
                                                     douts + stage * (Config::kDoutBytes / 16));
      float4 statistics[kCols / 8];  // of columns 8 j + 2 (lane % 4) and the next
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j)
        statistics[j] =
            LoadShared4(lane_statistics + (stage * kCols + 8 * j) * int{sizeof(float2)});
      WgmmaWait<Config::kDkey ? 1 : 0>();
      FenceRegisters(scores);
      // Rows past the last key may stay: they are not stored.
      const bool whole = band.HoldsAll(n * kCols, kCols, s, 16);
      if constexpr (Config::kModified) {
        ApplyAll<T, false>(scores, p.args, band, offsets, s, n * kCols, whole);
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j) {
          const float2 rest =
              LoadShared2(lane_rests + (stage * kCols + 8 * j) * int{sizeof(float)});
#pragma unroll
          for (int i = 4 * j; i < 4 * j + 4; ++i)
            scores[i] =
                Exp2((scores[i] - (i % 2 == 0 ? statistics[j].x : statistics[j].z)) * kLog2E -
                     (i % 2 == 0 ? rest.x : rest.y));
        }
      } else {
        if (!whole) ApplyBand<false>(scores, band, s, n * kCols, q_len);
#pragma unroll
        for (int i = 0; i < kCols / 2; ++i)
          scores[i] =
              Exp2(scores[i] * factor - (i % 2 == 0 ? statistics[i / 4].x : statistics[i / 4].z));
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
      if (++n == tile.first + tile.count) {  // the next head of the group
        n = tile.first;
        if constexpr (Config::kModified) offsets.NextOfGroup(p.args);
      }
    }
    if (lane == 0) BarrierArrive(shared.rows.empty());
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
    shared.rows.Init(WarpsOf(Config::kConsumers));
    shared.cols.Init(Config::kConsumers * kWarpgroupSize, kWarpSize);
    BarrierInitFence();
  }
  __syncthreads();
  const Band band(p.args);
  if (threadIdx.x < kWarpgroupSize) {
    LowerRegisters<ProducerRegisters(Config::kConsumers)>();
    if (threadIdx.x < kWarpSize) ProduceDkeyDvalue<Config>(p, shared, band);
  } else {
    RaiseRegisters<ConsumerRegisters(Config::kConsumers)>();
    ConsumeDkeyDvalue<Config>(p, shared, band);
  }
}

/// For problems that FitsHopper (cuda/attention.cu) admits.
template <typename Config>
Status LaunchDkeyDvalue(const AttentionBackwardArgs& a, const Launch& launch) {
  DkeyDvalueParams p{.query = {}, .key = {}, .value = {}, .dout = {}, .args = a, .schedule = {}};
  Status status = QueryMap(a, a.query, a.query_strides, a.qk_dim, Config::kCols, p.query);
  if (status.ok()) status = QueryMap(a, a.dout, a.out_strides, a.v_dim, Config::kCols, p.dout);
  if (status.ok()) status = KeyMap(a, a.key, a.key_strides, a.qk_dim, Config::kRows, p.key);
  if (status.ok()) status = KeyMap(a, a.value, a.value_strides, a.v_dim, Config::kRows, p.value);
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
