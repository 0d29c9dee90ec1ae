// Attention forward, one warp per query row, float32 arithmetic on any dtype and any head size: the
// oracle of the tiled kernels, and the fallback for what they do not take.
#include "cuda/attention/kernels.h"
#include "cuda/attention/problem.cuh"

namespace zenith::attention {
namespace {

constexpr int kWarpsPerBlock = 8;    // 8 consecutive queries of a head share its keys through L1
constexpr int kFeaturesPerLane = 8;  // a pass holds 256 output features in registers
constexpr int kFeaturesPerPass = kFeaturesPerLane * kWarpSize;

/// out[e] = mean over all keys of value[s, e]: what a row without an allowed key returns under
/// kMean.
template <typename T>
__device__ void WriteMean(const AttentionForwardArgs& args, const T* value, T* out, int lane) {
  for (int64_t e = lane; e < args.v_dim; e += kWarpSize) {
    float sum = 0;
    for (int64_t s = 0; s < args.kv_len; ++s)
      sum += ToFloat(value[s * args.value_strides.length + e]);
    out[e] = FromFloat<T>(sum / static_cast<float>(args.kv_len));  // NaN without keys: 0 / 0
  }
}

/// A lane scores one key of 32, then the warp adds the 32 weighted values, a lane per feature. Key
/// and value are read once per query and pass of 256 output features.
template <typename T>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    attention_naive_forward_kernel(const __grid_constant__ AttentionForwardArgs args) {
  const int lane = threadIdx.x;
  const int64_t row = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.y;
  if (row >= args.batch * args.kv_heads * args.groups * args.q_len) return;  // whole warps leave
  const int64_t t = row % args.q_len;
  const HeadIndex head = HeadIndex::Of(args, row / args.q_len);

  const T* query =
      RowPointer(static_cast<const T*>(args.query), args.query_strides, head.batch, head.head, t);
  const T* key =
      RowPointer(static_cast<const T*>(args.key), args.key_strides, head.batch, head.kv_head, 0);
  const T* value = RowPointer(static_cast<const T*>(args.value), args.value_strides, head.batch,
                              head.kv_head, 0);
  T* out = RowPointer(static_cast<T*>(args.out), args.out_strides, head.batch, head.head, t);
  const int64_t bias_row = ScoreOffset(args.bias_strides, head) + t * args.bias_strides.query;
  const Range keys = KeysInBand(args, t, t);

  float max = -INFINITY, sum = 0;
  int64_t first_feature = 0;
  do {  // once at least: lse is wanted even without output features
    float acc[kFeaturesPerLane] = {};
    max = -INFINITY, sum = 0;
    for (int64_t s0 = keys.begin; s0 < keys.end; s0 += kWarpSize) {
      const int64_t s = s0 + lane;
      float logit = -INFINITY;
      if (s < keys.end && IsAllowed(args, head, t, s)) {
        float dot = 0;
        const T* key_row = key + s * args.key_strides.length;
        for (int64_t d = 0; d < args.qk_dim; ++d) dot += ToFloat(query[d]) * ToFloat(key_row[d]);
        logit = Cap(args, args.scale * dot).logit;
        if (args.bias) logit += LoadBias(args, bias_row + s * args.bias_strides.key);
      }
      const float new_max = fmaxf(max, WarpAllReduce<Max>(logit));
      const float shift = new_max == -INFINITY ? 0.f : new_max;  // -inf - -inf would be NaN
      const float weight = expf(logit - shift), decay = expf(max - shift);
      max = new_max;
      sum = sum * decay + WarpAllReduce<Add>(weight);
      for (float& a : acc) a *= decay;
      const int valid = static_cast<int>(min(int64_t{kWarpSize}, keys.end - s0));
      for (int j = 0; j < valid; ++j) {
        const float w = __shfl_sync(kAllLanes, weight, j);
        if (w == 0) continue;  // a masked value may be NaN and must not be read
        const T* value_row = value + (s0 + j) * args.value_strides.length;
        for (int i = 0; i < kFeaturesPerLane; ++i) {
          const int64_t e = first_feature + i * kWarpSize + lane;
          if (e < args.v_dim) acc[i] += w * ToFloat(value_row[e]);
        }
      }
    }
    for (int i = 0; i < kFeaturesPerLane; ++i) {
      const int64_t e = first_feature + i * kWarpSize + lane;
      if (e < args.v_dim) out[e] = FromFloat<T>(acc[i] / sum);  // NaN for a dead row: 0 / 0
    }
    first_feature += kFeaturesPerPass;
  } while (first_feature < args.v_dim);

  const bool dead = sum == 0;  // else sum >= 1, the weight of the largest logit, or NaN
  if (dead && args.masked_row == MaskedRow::kMean) WriteMean(args, value, out, lane);
  if (lane == 0) WriteLse(args, row, dead, max, logf(sum));
}

}  // namespace

Status NaiveForward(const AttentionForwardArgs& args, const Launch& launch) {
  const int64_t rows = args.batch * args.kv_heads * args.groups * args.q_len;
  if (rows == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() {
    const auto blocks = static_cast<unsigned>((rows + kWarpsPerBlock - 1) / kWarpsPerBlock);
    attention_naive_forward_kernel<T>
        <<<blocks, dim3(kWarpSize, kWarpsPerBlock), 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

}  // namespace zenith::attention
