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

#include "cuda/attention/hopper/score_tiles.cuh"
#include "cuda/attention/kernels.h"

namespace zenith::attention::hopper {

/// kModified: as IsModified, and rows without an allowed key; but no softcap. kWalks: of these,
/// what leaves out tiles of keys, with a message for each that is left (TileWalk).
template <typename T_, int kQkDim_, int kVDim_, int kConsumers_, int kCols_,
          Scores kScores_ = Scores::kPlain>
struct ForwardConfig {
  using T = T_;
  static constexpr Scores kScores = kScores_;
  static constexpr bool kModified = kScores != Scores::kPlain;
  static constexpr bool kBias = kScores == Scores::kAny || kScores == Scores::kBias;
  static constexpr bool kWalks = kScores == Scores::kAny || kScores == Scores::kMasked;
  static constexpr int kQkDim = kQkDim_, kVDim = kVDim_;  // features, padded; multiples of 32
  static constexpr int kConsumers = kConsumers_;          // warpgroups
  static constexpr int kCols = kCols_;                    // keys per tile
  static constexpr int kStages = 2;                       // of keys, and as many of values
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kQueryBytes = TileBytes(kRows, kQkDim);
  static constexpr int kKeyBytes = TileBytes(kCols, kQkDim);
  static constexpr int kValueBytes = TileBytes(kCols, kVDim);
  static constexpr int kBiasBytes = kBias ? BiasBytes(kRows, kCols) : 0;
  static constexpr int kBiasColumns = kWalks ? hopper::kBiasColumns : kWideBiasColumns;
  static constexpr int kBitsBytes = kWalks ? kRows * BitsRowBytes(kCols) : 0;
  static constexpr int kTilesBytes =
      kQueryBytes + kStages * (kKeyBytes + kValueBytes + kBiasBytes + kBitsBytes);
  static constexpr int kMessagesBytes = kWalks ? (kStages + 1) * TileMessage::kBytes : 0;
  static constexpr int kSharedBytes = kTilesBytes + BarrierPair::kBytes +
                                      2 * BarrierRing<kStages>::kBytes + kMessagesBytes +
                                      kTileAlignment;
  static constexpr int kProducerRegisters = kConsumers == 2 && kWalks ? 56
                                            : kConsumers == 2 && kModified
                                                ? 40
                                                : hopper::ProducerRegisters(kConsumers);
  static_assert(kSharedBytes <= kMaxSharedBytes);
};

/// What the kernel takes: 128 bytes of each map and the problem in 32 bits.
struct ForwardParams {
  CUtensorMap query, key, value;
  ScoreTiles tiles;  // kModified
  AttentionForwardArgs args;
  Schedule schedule;
};

/// Addresses in shared memory.
template <typename Config>
struct ForwardShared {
  uint32_t query, keys, values, bias, bits;
  BarrierPair rows;
  BarrierRing<Config::kStages> key, value;  // bias, bits and message come with the keys
  MessageRing<Config::kStages> messages;

  __device__ __forceinline__ explicit ForwardShared(uint32_t base)
      : query((base + kTileAlignment - 1) & ~(kTileAlignment - 1)),
        keys(query + Config::kQueryBytes),
        values(keys + Config::kStages * Config::kKeyBytes),
        bias(values + Config::kStages * Config::kValueBytes),
        bits(bias + Config::kStages * Config::kBiasBytes),
        rows{query + Config::kTilesBytes},
        key{rows.end()},
        value{key.end()},
        messages{value.end()} {}
};

/// One warp, whose first lane issues the copies.
template <typename Config>
__device__ __forceinline__ void ProduceForward(const ForwardParams& p,
                                               const ForwardShared<Config>& shared,
                                               const Band& band) {
  constexpr int kRows = Config::kRows, kCols = Config::kCols;
  constexpr bool kWalks = Config::kWalks;
  const int rounds = p.schedule.total_rounds();
  Ring<Config::kStages> ring;
  uint32_t row_parity = 0;
  for (int round = 0; round < rounds; ++round) {
    const Schedule::Item item = p.schedule.At(round);
    if (item.tile < 0) continue;
    const auto tile =
        QueryTile<kRows, kCols>::Of(p.args, p.schedule, band, item, kWalks && !p.tiles.has_classes);
    const auto load_query = [&] {
      BarrierExpect(shared.rows.full(), Config::kQueryBytes);
      LoadTile<kRows, Config::kQkDim>(shared.query, p.query, shared.rows.full(), tile.t0, tile.head,
                                      tile.batch);
    };
    const auto load_key = [&](int n) {
      LoadTile<kCols, Config::kQkDim>(shared.keys + ring.stage * Config::kKeyBytes, p.key,
                                      shared.key.full(ring.stage), n * kCols, tile.kv_head,
                                      tile.batch);
    };
    [[maybe_unused]] const auto load_bias = [&](int n) {
      p.tiles.LoadBias<kRows, kCols, Config::kBiasColumns>(
          shared.bias + ring.stage * Config::kBiasBytes, shared.key.full(ring.stage), tile.t0,
          n * kCols, tile.head, tile.batch);
    };
    const auto load_value = [&](int n) {
      BarrierWait(shared.value.empty(ring.stage), ring.parity ^ 1);
      BarrierExpect(shared.value.full(ring.stage), Config::kValueBytes);
      LoadTile<kCols, Config::kVDim>(shared.values + ring.stage * Config::kValueBytes, p.value,
                                     shared.value.full(ring.stage), n * kCols, tile.kv_head,
                                     tile.batch);
    };
    if constexpr (kWalks) {
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
        load_query();
      }
      row_parity ^= 1;
      for (; step.tile >= 0; ring.Advance()) {
        const int n = step.tile;
        const bool open = step.is_open;
        step = next();
        if (threadIdx.x != 0) continue;
        const uint32_t full = shared.key.full(ring.stage);
        const bool with_bits = p.tiles.has_bits && !open;
        BarrierWait(shared.key.empty(ring.stage), ring.parity ^ 1);
        shared.messages.Store(ring.stage, n, step.tile < 0, open);
        BarrierExpect(full, Config::kKeyBytes +
                                (Config::kBias ? p.tiles.bias_bytes(kRows, kCols) : 0) +
                                (with_bits ? p.tiles.bits_bytes<true>(kRows, kCols) : 0));
        load_key(n);
        if (Config::kBias && p.tiles.has_bias) load_bias(n);
        if (with_bits)
          p.tiles.LoadBits<true>(shared.bits + ring.stage * Config::kBitsBytes, full, matrix,
                                 tile.t0, n * kCols);
        load_value(n);
      }
    } else {
      if (threadIdx.x != 0) continue;
      BarrierWait(shared.rows.empty(), row_parity ^ 1);
      row_parity ^= 1;
      load_query();
      for (int n = tile.first + tile.count - 1; n >= tile.first; --n, ring.Advance()) {
        BarrierWait(shared.key.empty(ring.stage), ring.parity ^ 1);
        BarrierExpect(shared.key.full(ring.stage),
                      Config::kKeyBytes + (Config::kBias ? p.tiles.bias_bytes(kRows, kCols) : 0));
        load_key(n);
        if constexpr (Config::kBias) load_bias(n);
        load_value(n);
      }
    }
  }
}

/// The running softmax of this lane's two rows.
struct OnlineSoftmax {
  /// Up to here (in units of log2) a maximum may be rounded before it is subtracted; above, where a
  /// bias of -1e9 fills rows, what is left of a logit counts.
  static constexpr float kLargeShift = 1024;

  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};

  /// Scores become weights 2^(factor * (score - max)); `decay`: of what was summed before.
  /// kMayBeLarge: whether scores may pass kLargeShift. All lanes of the warp.
  template <bool kMayBeLarge, int N>
  __device__ __forceinline__ void Update(float (&scores)[N], float (&decay)[2], float factor) {
    if constexpr (kMayBeLarge) {
      const float row_max[2] = {RowMax(scores, 0), RowMax(scores, 1)};
      const bool large = IsLarge(row_max[0], factor) || IsLarge(row_max[1], factor);
      if (__any_sync(kAllLanes, large))
#pragma unroll
        for (int half = 0; half < 2; ++half)
          decay[half] = Weigh<true>(scores, half, row_max[half], factor);
      else
#pragma unroll
        for (int half = 0; half < 2; ++half)
          decay[half] = Weigh<false>(scores, half, row_max[half], factor);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        decay[half] = Weigh<false>(scores, half, RowMax(scores, half), factor);
    }
  }

  /// Logarithm of the sum, after the maximum of a row was subtracted, exactly.
  __device__ __forceinline__ float LogSum(float row_max, float row_sum, float factor) const {
    // What rounding left of factor * max is in each weight.
    const float rest =
        IsLarge(row_max, factor) ? 0.f : fmaf(row_max, factor, -__fmul_rn(row_max, factor));
    return logf(row_sum) - kLn2 * rest;
  }

 private:
  static __device__ __forceinline__ bool IsLarge(float row_max, float factor) {
    return fabsf(row_max * factor) > kLargeShift && row_max != -INFINITY;
  }

  /// Of a row so far, and of these scores.
  template <int N>
  __device__ __forceinline__ float RowMax(const float (&scores)[N], int half) const {
    float high[2] = {scores[2 * half], scores[2 * half + 1]};
#pragma unroll
    for (int j = 4; j < N; j += 4) {
      high[0] = fmaxf(high[0], scores[j + 2 * half]);
      high[1] = fmaxf(high[1], scores[j + 2 * half + 1]);
    }
    return fmaxf(max[half], QuadReduce<Max>(fmaxf(high[0], high[1])));
  }

  /// Returns the decay.
  template <bool kSubtractFirst, int N>
  __device__ __forceinline__ float Weigh(float (&scores)[N], int half, float row_max,
                                         float factor) {
    const float finite_max = row_max == -INFINITY ? 0.f : row_max;  // no -inf - -inf
    const float shift = __fmul_rn(finite_max, factor);
    const auto weight = [&](float score) {
      return Exp2(kSubtractFirst ? (score - finite_max) * factor : score * factor - shift);
    };
    // Exactly 1 while the maximum stays: what rounding left would come once more with each tile.
    const float decay =
        kSubtractFirst ? weight(max[half]) : Exp2(__fmul_rn(max[half], factor) - shift);
    max[half] = row_max;
    float low[2] = {sum[half] * decay, 0};
#pragma unroll
    for (int j = 0; j < N; j += 4)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = scores[j + 2 * half + i];
        score = weight(score);
        low[i] += score;
      }
    sum[half] = low[0] + low[1];
    return decay;
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
  const bool natural = Config::kBias && (!Config::kWalks || p.tiles.natural);
  const float factor = natural ? kLog2E : p.args.scale * kLog2E;

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
  const auto release_rows = [&] {  // every lane where it read the message
    if (Config::kWalks || lane == 0) BarrierArrive(shared.rows.empty());
  };

  const int tile_row = group * 64 + warp * 16;
  [[maybe_unused]] const BiasLane bias_lane =
      BiasLane::ByQuery<Config::kBiasColumns>(p.tiles, tile_row, Config::kRows);

  const int rounds = p.schedule.total_rounds();
  Ring<Config::kStages> ring;
  uint32_t row_parity = 0;
  for (int round = 0; round < rounds; ++round) {
    const Schedule::Item item = p.schedule.At(round);
    if (item.tile < 0) continue;
    const auto tile =
        QueryTile<Config::kRows, Config::kCols>::Of(p.args, p.schedule, band, item, false);
    const int t = tile.t0 + tile_row;
    int n = tile.first + tile.count;  // the tile of keys
    [[maybe_unused]] TileMessage message;
    const auto next = [&] {  // is in the ring's buffer
      if constexpr (Config::kWalks) {
        message = shared.messages.Load(ring.stage);
        n = message.tile();
      } else {
        --n;
      }
    };
    const auto is_last = [&] { return Config::kWalks ? message.last() : n <= tile.first; };
    // Of the scores of tile n, in `stage`, which is then released.
    const auto apply = [&](uint32_t stage) {
      const bool whole = (n + 1) * kCols <= kv_len && band.HoldsAll(t, 16, n * kCols, kCols);
      if constexpr (Config::kModified) {
        ApplyAll<true, Config::kScores>(scores, p.args, p.tiles, band, tile.head_index(p.args),
                                        bias_lane, shared.bias + stage * Config::kBiasBytes,
                                        shared.bits + stage * Config::kBitsBytes, message, t,
                                        n * kCols, tile_row, whole);
        BarrierArrive(shared.key.empty(stage));  // every lane: it read message, bias and bits
      } else {
        release(shared.key.empty(stage));
        if (!whole) ApplyBand<true>(scores, band, t, n * kCols, kv_len);
      }
    };
    OnlineSoftmax softmax;
    float decay[2];

    BarrierWait(shared.rows.full(), row_parity);
    row_parity ^= 1;
    if constexpr (Config::kWalks) {
      if (!shared.messages.LoadAny()) {  // no query of the tile has a key
        release_rows();
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
    next();
    apply(ring.stage);
    softmax.Update<Config::kBias>(scores, decay, factor);
    Pack<T>(scores, weights);
    bool accumulate = false;
    while (!is_last()) {
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
      next();
      apply(ring.stage);
      softmax.Update<Config::kBias>(scores, decay, factor);
      WgmmaWait<0>();
      FenceRegisters(acc);
      release(shared.value.empty(last.stage));
#pragma unroll
      for (int i = 0; i < kVDim / 2; ++i) acc[i] *= decay[i / 2 % 2];
      Pack<T>(scores, weights);
    }
    release_rows();
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
          const float max = softmax.max[half];
          WriteLse(p.args, index, sum == 0, natural ? max : max * p.args.scale,
                   softmax.LogSum(max, sum, factor));
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
    constexpr int kWarps = WarpsOf(Config::kConsumers), kLanes = kWarps * kWarpSize;
    shared.rows.Init(Config::kWalks ? kLanes : kWarps);
    shared.key.Init(Config::kModified ? kLanes : kWarps);
    shared.value.Init(kWarps);
    BarrierInitFence();
  }
  __syncthreads();
  const Band band(p.args);
  if (threadIdx.x < kWarpgroupSize) {
    LowerRegisters<Config::kProducerRegisters>();
    if (threadIdx.x < kWarpSize) ProduceForward<Config>(p, shared, band);
  } else {
    RaiseRegisters<ConsumerRegisters(Config::kConsumers, Config::kProducerRegisters)>();
    ConsumeForward<Config>(p, shared, band);
  }
}

/// For problems that FitsHopper (cuda/attention.cu) admits.
template <typename Config>
Status LaunchForward(const AttentionForwardArgs& a, const Launch& launch) {
  ForwardParams p{.query = {}, .key = {}, .value = {}, .tiles = {}, .args = a, .schedule = {}};
  Status status = QueryMap(a, a.query, a.query_strides, a.qk_dim, Config::kRows, p.query);
  if (status.ok()) status = KeyMap(a, a.key, a.key_strides, a.qk_dim, Config::kCols, p.key);
  if (status.ok()) status = KeyMap(a, a.value, a.value_strides, a.v_dim, Config::kCols, p.value);
  if (status.ok() && Config::kModified)
    status = MakeScoreTiles<true, Config::kBiasColumns>(a, Config::kRows, Config::kCols, p.tiles);
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
