// The consumers of a launch that makes dvalue alone (dkey_dvalue.cuh).
#pragma once

#include "cuda/attention/hopper/dkey_dvalue_producer.cuh"

namespace zenith::attention::hopper {

/// As in the forward, the next scores and the sum over the last weights are issued together, and
/// the exponentials taken while the sum is under way: 711 us where 746 were the best of those that
/// wait (b4 h8 s4096 d256, H100, bfloat16, 11/2026).
template <typename Config>
__device__ __forceinline__ void ConsumeDvalue(const DkeyDvalueParams& p,
                                              const DkeyDvalueShared<Config>& shared,
                                              const Band& band) {
  using T = typename Config::T;
  constexpr int kVDim = Config::kVDim, kCols = Config::kCols;
  static_assert(!Config::kDkey && !Config::kModified);
  const int group = ConsumerIndex();
  const int warp = threadIdx.x % kWarpgroupSize / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int kv_len = static_cast<int>(p.args.kv_len), q_len = static_cast<int>(p.args.q_len);
  const float factor = p.args.scale * kLog2E;

  const uint64_t key = MatrixDescriptor(shared.key + group * 64 * kBlockRowBytes);
  const uint64_t queries = MatrixDescriptor(shared.queries);
  const uint64_t douts = MatrixDescriptor(shared.douts, kCols * kBlockRowBytes);
  const uint32_t lane_statistics = shared.statistics + lane % 4 * 2 * int{sizeof(float2)};
  const int rounds = p.schedule.total_rounds();
  Ring<Config::kStages> ring;
  Ring<Config::kDoutStages> dout_ring;
  uint32_t row_parity = 0;
  for (int round = 0; round < rounds; ++round) {
    const Schedule::Item item = p.schedule.At(round);
    if (item.tile < 0) continue;
    const auto tile = KeyTile<Config::kRows, kCols>::Of(p.args, band, item, false);
    const int s = tile.s0 + group * 64 + warp * 16;
    int steps = tile.count * static_cast<int>(p.args.groups);
    int n = tile.first;  // the tile of queries
    float scores[kCols / 2], dvalue[kVDim / 2], lse[kCols / 4];
    uint32_t weights[kCols / 16][4];

    const auto issue_scores = [&] {
      MultiplyRows<T, Config::kQkDim, Config::kRows, kCols>(
          scores, key, queries + ring.stage * (Config::kQueryBytes / 16));
    };
    const auto issue_sum = [&] {
      MultiplyColumns<T>(dvalue, weights, douts + dout_ring.stage * (Config::kDoutBytes / 16),
                         true);
    };
    const auto load_lse = [&] {  // of columns 8 j + 2 (lane % 4) and the next
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
        const float4 statistics =
            LoadShared4(lane_statistics + (ring.stage * kCols + 8 * j) * int{sizeof(float2)});
        lse[2 * j] = statistics.x, lse[2 * j + 1] = statistics.z;
      }
    };
    const auto weigh = [&] {  // the scores become weights, and the queries are done with
      BarrierArrive(shared.query.empty(ring.stage));  // every lane: it read statistics
      ring.Advance();
      if (!band.HoldsAll(n * kCols, kCols, s, 16))
        ApplyBand<false>(scores, band, s, n * kCols, q_len);
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i)
        scores[i] = Exp2(scores[i] * factor - lse[i / 4 * 2 + i % 2]);
      if (++n == tile.first + tile.count) n = tile.first;  // the next head of the group
    };
    const auto release_dout = [&] {
      if (lane == 0) BarrierArrive(shared.dout.empty(dout_ring.stage));
      dout_ring.Advance();
    };

    BarrierWait(shared.rows.full(), row_parity);
    row_parity ^= 1;
#pragma unroll
    for (float& x : dvalue) x = 0;
    if (steps > 0) {
      BarrierWait(shared.query.full(ring.stage), ring.parity);
      FenceRegisters(scores);
      WgmmaFence();
      issue_scores();
      load_lse();
      WgmmaWait<0>();
      FenceRegisters(scores);
      weigh();
      Pack<T>(scores, weights);
      for (; steps > 1; --steps) {
        BarrierWait(shared.query.full(ring.stage), ring.parity);
        FenceRegisters(scores);
        FenceRegisters(dvalue);
        WgmmaFence();
        issue_scores();
        BarrierWait(shared.dout.full(dout_ring.stage), dout_ring.parity);
        WgmmaFence();
        issue_sum();
        load_lse();
        WgmmaWait<1>();
        FenceRegisters(scores);
        weigh();
        WgmmaWait<0>();
        FenceRegisters(dvalue);
        release_dout();
        Pack<T>(scores, weights);
      }
      BarrierWait(shared.dout.full(dout_ring.stage), dout_ring.parity);
      FenceRegisters(dvalue);
      WgmmaFence();
      issue_sum();
      WgmmaWait<0>();
      FenceRegisters(dvalue);
      release_dout();
    }
    if (lane == 0) BarrierArrive(shared.rows.empty());
    const float one[2] = {1, 1};
    StoreFragment(dvalue, one,
                  RowPointer(static_cast<T*>(p.args.dvalue), p.args.value_strides, tile.batch,
                             tile.kv_head, s),
                  p.args.value_strides.length, kv_len - s, static_cast<int>(p.args.v_dim));
  }
}

}  // namespace zenith::attention::hopper
