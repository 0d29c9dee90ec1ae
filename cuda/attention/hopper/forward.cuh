// Attention forward for Hopper (FlashAttention-3: Shah et al. 2024, arXiv:2407.08608), 16-bit
// types. A persistent block works on tiles of 64 queries a consumer warpgroup. One warp of the
// producer warpgroup has TMA fill the query tile and a ring of key and value tiles; consumers
// multiply with wgmma, straight from there.
//
// A consumer issues the scores of the next keys and the weighted sum of the last values together
// and takes the softmax of those scores while the sum is under way. That the warpgroups take turns
// in issuing, as in the paper, brought nothing here. query and out cross memory once, key and value
// once per query tile, from L2 for the most part (schedule.cuh). What was tried and measured stands
// in docs/kernels/attention_hopper.md.
#pragma once

#include "cuda/attention/hopper/fragment.cuh"
#include "cuda/attention/hopper/pipeline.cuh"
#include "cuda/attention/kernels.h"

namespace zenith::attention::hopper {

/// kModified: as IsModified, and rows without an allowed key; but no softcap.
template <typename T_, int kQkDim_, int kVDim_, int kConsumers_, int kCols_,
          bool kModified_ = false>
struct ForwardConfig {
  using T = T_;
  static constexpr bool kModified = kModified_;
  static constexpr int kQkDim = kQkDim_, kVDim = kVDim_;  // features, padded; multiples of 32
  static constexpr int kConsumers = kConsumers_;          // warpgroups
  static constexpr int kCols = kCols_;                    // keys per tile
  static constexpr int kStages = 2;                       // of keys, and as many of values
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kQueryBytes = TileBytes(kRows, kQkDim);
  static constexpr int kKeyBytes = TileBytes(kCols, kQkDim);
  static constexpr int kValueBytes = TileBytes(kCols, kVDim);
  static constexpr int kTilesBytes = kQueryBytes + kStages * (kKeyBytes + kValueBytes);
  static constexpr int kSharedBytes =
      kTilesBytes + BarrierPair::kBytes + 2 * BarrierRing<kStages>::kBytes + kTileAlignment;
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

/// What the kernel takes: 128 bytes of each map and the problem in 32 bits.
struct ForwardParams {
  CUtensorMap query, key, value;
  AttentionForwardArgs args;
  Schedule schedule;
};

/// Addresses in shared memory.
template <typename Config>
struct ForwardShared {
  uint32_t query, keys, values;
  BarrierPair rows;
  BarrierRing<Config::kStages> key, value;

  __device__ __forceinline__ explicit ForwardShared(uint32_t base)
      : query((base + kTileAlignment - 1) & ~(kTileAlignment - 1)),
        keys(query + Config::kQueryBytes),
        values(keys + Config::kStages * Config::kKeyBytes),
        rows{query + Config::kTilesBytes},
        key{rows.end()},
        value{key.end()} {}
};

/// One warp, whose first lane issues the copies.
template <typename Config>
__device__ __forceinline__ void ProduceForward(const ForwardParams& p,
                                               const ForwardShared<Config>& shared,
                                               const Band& band) {
  const int rounds = p.schedule.total_rounds();
  Ring<Config::kStages> ring;
  uint32_t row_parity = 0;
  for (int round = 0; round < rounds; ++round) {
    const Schedule::Item item = p.schedule.At(round);
    if (item.tile < 0) continue;
    const auto tile = QueryTile<Config::kRows, Config::kCols>::template Of<Config::kModified>(
        p.args, p.schedule, band, item);
    if (threadIdx.x != 0) continue;
    BarrierWait(shared.rows.empty(), row_parity ^ 1);
    row_parity ^= 1;
    BarrierExpect(shared.rows.full(), Config::kQueryBytes);
    LoadTile<Config::kRows, Config::kQkDim>(shared.query, p.query, shared.rows.full(), tile.t0,
                                            tile.head, tile.batch);
    for (int n = tile.first + tile.count - 1; n >= tile.first; --n, ring.Advance()) {
      BarrierWait(shared.key.empty(ring.stage), ring.parity ^ 1);
      BarrierExpect(shared.key.full(ring.stage), Config::kKeyBytes);
      LoadTile<Config::kCols, Config::kQkDim>(shared.keys + ring.stage * Config::kKeyBytes, p.key,
                                              shared.key.full(ring.stage), n * Config::kCols,
                                              tile.kv_head, tile.batch);
      BarrierWait(shared.value.empty(ring.stage), ring.parity ^ 1);
      BarrierExpect(shared.value.full(ring.stage), Config::kValueBytes);
      LoadTile<Config::kCols, Config::kVDim>(shared.values + ring.stage * Config::kValueBytes,
                                             p.value, shared.value.full(ring.stage),
                                             n * Config::kCols, tile.kv_head, tile.batch);
    }
  }
}

/// The running softmax of this lane's two rows.
struct OnlineSoftmax {
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  /// Scores become weights 2^(factor * (score - max)); `decay`: of what was summed before.
  /// kSubtractFirst: for scores so large that factor * max has no digits left.
  template <bool kSubtractFirst, int N>
  __device__ __forceinline__ void Update(float (&scores)[N], float (&decay)[2], float factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high[2] = {scores[2 * half], scores[2 * half + 1]};
#pragma unroll
      for (int j = 4; j < N; j += 4) {
        high[0] = fmaxf(high[0], scores[j + 2 * half]);
        high[1] = fmaxf(high[1], scores[j + 2 * half + 1]);
      }
      const float row_max = fmaxf(max[half], QuadReduce<Max>(fmaxf(high[0], high[1])));
      const float finite_max = row_max == -INFINITY ? 0.f : row_max;  // no -inf - -inf
      const float shift = __fmul_rn(finite_max, factor);
      const auto weight = [&](float score) {
        return Exp2(kSubtractFirst ? (score - finite_max) * factor : score * factor - shift);
      };
      // Exactly 1 while the maximum stays: what rounding left would come once more with each tile.
      decay[half] = kSubtractFirst ? weight(max[half]) : Exp2(__fmul_rn(max[half], factor) - shift);
      max[half] = row_max;
      float low[2] = {sum[half] * decay[half], 0};
#pragma unroll
      for (int j = 0; j < N; j += 4)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[j + 2 * half + i];
          score = weight(score);
          low[i] += score;
        }
      sum[half] = low[0] + low[1];
    }
  }
};

template <typename Config>
__device__ __forceinline__ void ConsumeForward(const ForwardParams& p,
                                               const ForwardShared<Config>& shared,
                                               const Band& band) {
  using T = typename Config::T;
  constexpr int kVDim = Config::kVDim, kCols = Config::kCols;
  const int group = ConsumerIndex();
  const int warp = threadIdx.x % kWarpgroupSize / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int q_len = static_cast<int>(p.args.q_len), kv_len = static_cast<int>(p.args.kv_len);
  const float factor = Config::kModified ? kLog2E : p.args.scale * kLog2E;

  const uint64_t query = MatrixDescriptor(shared.query + group * 64 * kBlockRowBytes);
  const uint64_t keys = MatrixDescriptor(shared.keys);
  const uint64_t values = MatrixDescriptor(shared.values, kCols * kBlockRowBytes);
  float scores[kCols / 2], acc[kVDim / 2];
  uint32_t weights[kCols / 16][4];

  const auto issue_scores = [&](uint32_t stage) {
    MultiplyRows<T, Config::kQkDim, Config::kRows, kCols>(scores, query,
                                                          keys + stage * (Config::kKeyBytes / 16));
  };
  const auto issue_sum = [&](uint32_t stage, bool accumulate) {
    MultiplyColumns<T>(acc, weights, values + stage * (Config::kValueBytes / 16), accumulate);
  };
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) BarrierArrive(barrier);
  };

  const int rounds = p.schedule.total_rounds();
  Ring<Config::kStages> ring;
  uint32_t row_parity = 0;
  for (int round = 0; round < rounds; ++round) {
    const Schedule::Item item = p.schedule.At(round);
    if (item.tile < 0) continue;
    const auto tile = QueryTile<Config::kRows, Config::kCols>::template Of<Config::kModified>(
        p.args, p.schedule, band, item);
    const ScoreOffsets offsets(p.args, tile.head_index(p.args));
    const int t = tile.t0 + group * 64 + warp * 16;
    const auto apply_band = [&](int n) {
      if constexpr (Config::kModified)
        ApplyAll<T, true>(scores, p.args, band, offsets, t, n * kCols,
                          (n + 1) * kCols <= kv_len && band.HoldsAll(t, 16, n * kCols, kCols));
      else if ((n + 1) * kCols > kv_len || !band.HoldsAll(t, 16, n * kCols, kCols))
        ApplyBand<true>(scores, band, t, n * kCols, kv_len);
    };
    OnlineSoftmax softmax;
    float decay[2];
    int n = tile.first + tile.count - 1;

    BarrierWait(shared.rows.full(), row_parity);
    row_parity ^= 1;
    if constexpr (Config::kModified) {
      if (tile.count == 0) {  // no query of the tile has a key
        release(shared.rows.empty());
#pragma unroll
        for (float& x : acc) x = NAN;
        const float one[2] = {1, 1};
        for (int row = t + lane; row < min(t + 16, q_len); row += kWarpSize)
          WriteLse(p.args, FirstRow(p.args, tile.head_index(p.args)) + row, true, 0, 0);
        StoreFragment(
            acc, one,
            RowPointer(static_cast<T*>(p.args.out), p.args.out_strides, tile.batch, tile.head, t),
            p.args.out_strides.length, q_len - t, static_cast<int>(p.args.v_dim));
        continue;
      }
    }
    BarrierWait(shared.key.full(ring.stage), ring.parity);
    FenceRegisters(scores);
    WgmmaFence();
    issue_scores(ring.stage);
    WgmmaWait<0>();
    FenceRegisters(scores);
    release(shared.key.empty(ring.stage));
    apply_band(n);
    softmax.Update<Config::kModified>(scores, decay, factor);
    Pack<T>(scores, weights);
    bool accumulate = false;
    for (--n; n >= tile.first; --n) {
      const Ring<Config::kStages> last = ring;
      ring.Advance();
      BarrierWait(shared.value.full(last.stage), last.parity);
      BarrierWait(shared.key.full(ring.stage), ring.parity);
      FenceRegisters(scores);
      FenceRegisters(acc);
      WgmmaFence();
      issue_scores(ring.stage);
      issue_sum(last.stage, accumulate);
      accumulate = true;
      WgmmaWait<1>();
      FenceRegisters(scores);
      release(shared.key.empty(ring.stage));
      apply_band(n);
      softmax.Update<Config::kModified>(scores, decay, factor);
      WgmmaWait<0>();
      FenceRegisters(acc);
      release(shared.value.empty(last.stage));
#pragma unroll
      for (int i = 0; i < kVDim / 2; ++i) acc[i] *= decay[i / 2 % 2];
      Pack<T>(scores, weights);
    }
    release(shared.rows.empty());
    BarrierWait(shared.value.full(ring.stage), ring.parity);
    FenceRegisters(acc);
    WgmmaFence();
    issue_sum(ring.stage, accumulate);
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = QuadReduce<Add>(softmax.sum[half]);
      inverse[half] = 1.f / sum;
      const int row = t + lane / 4 + 8 * half;
      if (row < q_len && lane % 4 == 0) {
        const int64_t index =
            (tile.batch * p.args.kv_heads * p.args.groups + tile.head) * p.args.q_len + row;
        if constexpr (Config::kModified) {
          WriteLse(p.args, index, sum == 0, softmax.max[half], logf(sum));
        } else {
          p.args.lse[index] = kLn2 * (__fmul_rn(softmax.max[half], factor) + log2f(sum));
          p.args.lse_rest[index] = 0;
        }
      }
    }
    WgmmaWait<0>();
    FenceRegisters(acc);
    release(shared.value.empty(ring.stage));
    ring.Advance();
    StoreFragment(
        acc, inverse,
        RowPointer(static_cast<T*>(p.args.out), p.args.out_strides, tile.batch, tile.head, t),
        p.args.out_strides.length, q_len - t, static_cast<int>(p.args.v_dim));
  }
}

template <typename Config>
__global__ void __launch_bounds__(ThreadsOf(Config::kConsumers), 1)
    hopper_attention_forward_kernel(const __grid_constant__ ForwardParams p) {
  extern __shared__ unsigned char shared_bytes[];
  const ForwardShared<Config> shared(SharedAddress(shared_bytes));
  if (threadIdx.x == 0) {
    shared.rows.Init(WarpsOf(Config::kConsumers));
    shared.key.Init(WarpsOf(Config::kConsumers));
    shared.value.Init(WarpsOf(Config::kConsumers));
    BarrierInitFence();
  }
  __syncthreads();
  const Band band(p.args);
  if (threadIdx.x < kWarpgroupSize) {
    LowerRegisters<ProducerRegisters(Config::kConsumers)>();
    if (threadIdx.x < kWarpSize) ProduceForward<Config>(p, shared, band);
  } else {
    RaiseRegisters<ConsumerRegisters(Config::kConsumers)>();
    ConsumeForward<Config>(p, shared, band);
  }
}

/// For problems that FitsHopper (cuda/attention.cu) admits.
template <typename Config>
Status LaunchForward(const AttentionForwardArgs& a, const Launch& launch) {
  ForwardParams p{.query = {}, .key = {}, .value = {}, .args = a, .schedule = {}};
  Status status = QueryMap(a, a.query, a.query_strides, a.qk_dim, Config::kRows, p.query);
  if (status.ok()) status = KeyMap(a, a.key, a.key_strides, a.qk_dim, Config::kCols, p.key);
  if (status.ok()) status = KeyMap(a, a.value, a.value_strides, a.v_dim, Config::kCols, p.value);
  if (!status.ok()) return status;
  const auto kernel = hopper_attention_forward_kernel<Config>;
  int blocks = 0;
  status = Prepare(kernel, Config::kSharedBytes, blocks);
  if (!status.ok()) return status;
  p.schedule = ScheduleOfQueries<Config>(a, blocks);
  kernel<<<static_cast<unsigned>(blocks), ThreadsOf(Config::kConsumers), Config::kSharedBytes,
           launch.stream>>>(p);
  return LastLaunch();
}

}  // namespace zenith::attention::hopper
