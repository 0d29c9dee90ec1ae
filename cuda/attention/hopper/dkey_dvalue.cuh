// dkey and dvalue for Hopper: a persistent block takes tiles of 64 keys a consumer warpgroup and
// streams over the queries, of each head of the group, whose band holds them:
//   p^T = exp(scale * key . query - lse);  dlogits^T = p^T * (value . dout - delta)
//   dvalue = p^T . dout;  dkey = scale * dlogits^T . query
// With keys as rows p^T and dlogits^T are, packed, the A operands of the products that follow, and
// the sums over queries stay in registers, in one order: deterministic, without atomics. The price
// is that dquery (dquery.cuh) computes p and dp again, seven products for five. key, value and the
// results cross memory once, query and dout once per tile of keys. Head sizes of 256 leave no
// registers for both accumulators: then one launch makes dkey and another dvalue.
#pragma once

#include "cuda/attention/hopper/dvalue.cuh"

namespace zenith::attention::hopper {

template <typename Config>
__device__ __forceinline__ void ConsumeDkeyDvalue(const DkeyDvalueParams& p,
                                                  const DkeyDvalueShared<Config>& shared,
                                                  const Band& band) {
  using T = typename Config::T;
  static_assert(Config::kDkey);
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
  const uint64_t queries = MatrixDescriptor(shared.queries);
  const uint64_t douts = MatrixDescriptor(shared.douts);
  const uint64_t queries_by_column = MatrixDescriptor(shared.queries, kCols * kBlockRowBytes);
  const uint64_t douts_by_column = MatrixDescriptor(shared.douts, kCols * kBlockRowBytes);
  const uint32_t lane_statistics = shared.statistics + lane % 4 * 2 * int{sizeof(float2)};
  const uint32_t lane_rests = shared.rests + lane % 4 * 2 * int{sizeof(float)};
  float scores[kCols / 2], dp[kCols / 2], dkey[kQkDim / 2], dvalue[kVDim / 2];
  uint32_t weights[kCols / 16][4], dlogits[kCols / 16][4];

  const int rounds = p.schedule.total_rounds();
  RingPair<Config::kStages, Config::kDoutStages> rings;
  const auto& ring = rings.first();
  const auto& dout_ring = rings.second();
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
      BarrierWait(shared.query.full(stage), ring.parity);
      [[maybe_unused]] TileMessage message;
      if constexpr (Config::kModified) {
        message = shared.messages.Load(stage);
        n = message.tile(), group = shared.messages.LoadGroup(stage);
        if (message.last()) steps = 0;
      } else {
        --steps;
      }
      const uint32_t dout_stage = Config::kApart ? dout_ring.stage : stage;
      const uint64_t dout_offset = dout_stage * (Config::kDoutBytes / 16);
      FenceRegisters(scores);
      FenceRegisters(dp);
      WgmmaFence();
      MultiplyRows<T, kQkDim, Config::kRows, kCols>(scores, key,
                                                    queries + stage * (Config::kQueryBytes / 16));
      if constexpr (Config::kApart) {
        BarrierWait(shared.dout.full(dout_stage), dout_ring.parity);
        WgmmaFence();
      }
      MultiplyRows<T, kVDim, Config::kRows, kCols>(dp, value, douts + dout_offset);
      // Of columns 8 j + 2 (lane % 4) and the next. Where there are no registers left, as with a
      // bias or wide heads, read when used, twice.
      float4 statistics[kCols / 8];
      const auto load_statistics = [&](int j) {
        statistics[j] =
            LoadShared4(lane_statistics + (stage * kCols + 8 * j) * int{sizeof(float2)});
      };
      if constexpr (!Config::kLateStatistics)
#pragma unroll
        for (int j = 0; j < kCols / 8; ++j) load_statistics(j);
      WgmmaWait<1>();
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
          if (Config::kLateStatistics && i % 4 == 0) load_statistics(i / 4);
          scores[i] =
              Exp2(scores[i] * factor - (i % 2 == 0 ? statistics[i / 4].x : statistics[i / 4].z));
        }
      }
      if constexpr (Config::kDvalue) Pack<T>(scores, weights);
      WgmmaWait<0>();
      FenceRegisters(dp);
      if (Config::kApart && lane == 0) BarrierArrive(shared.dout.empty(dout_stage));
      if constexpr (Config::kDvalue) {
        FenceRegisters(dvalue);
        WgmmaFence();
        MultiplyColumns<T>(dvalue, weights, douts_by_column + dout_offset, true);
      }
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) {
        if (Config::kLateStatistics && i % 4 == 0) load_statistics(i / 4);
        const float dlogit =
            scores[i] * (dp[i] - (i % 2 == 0 ? statistics[i / 4].y : statistics[i / 4].w));
        scores[i] = Config::kModified && scores[i] == 0 ? 0.f : dlogit;  // NaN behind a mask
      }
      Pack<T>(scores, dlogits);
      FenceRegisters(dkey);
      WgmmaFence();
      MultiplyColumns<T>(dkey, dlogits, queries_by_column + stage * (Config::kQueryBytes / 16),
                         true);
      WgmmaWait<0>();
      if constexpr (Config::kDvalue) FenceRegisters(dvalue);
      FenceRegisters(dkey);
      // Every lane for itself: what it read are ordinary loads, of the statistics.
      BarrierArrive(shared.query.empty(stage));
      rings.Advance();
      if constexpr (!Config::kModified)
        if (++n == tile.first + tile.count) n = tile.first;  // the next head of the group
    }
    if (Config::kModified || lane == 0) BarrierArrive(shared.rows.empty());
    const float scale[2] = {p.args.scale, p.args.scale}, one[2] = {1, 1};
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
    shared.query.Init(Config::kConsumers * kWarpgroupSize, kWarpSize);
    if constexpr (Config::kApart) shared.dout.Init(WarpsOf(Config::kConsumers));
    BarrierInitFence();
  }
  __syncthreads();
  const Band band(p.args);
  if (threadIdx.x < kWarpgroupSize) {
    LowerRegisters<Config::kProducerRegisters>();
    if (threadIdx.x < kWarpSize) ProduceDkeyDvalue<Config>(p, shared, band);
  } else {
    RaiseRegisters<ConsumerRegisters(Config::kConsumers, Config::kProducerRegisters)>();
    if constexpr (Config::kDkey)
      ConsumeDkeyDvalue<Config>(p, shared, band);
    else
      ConsumeDvalue<Config>(p, shared, band);
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
