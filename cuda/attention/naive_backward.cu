// Attention backward, float32 arithmetic on any dtype and any head size: one warp per query row for
// dquery and dbias, one warp per key row for dkey and dvalue. The oracle of the tiled kernels.
#include "cuda/attention/kernels.h"
#include "cuda/attention/problem.cuh"

namespace zenith::attention {
namespace {

constexpr int kWarpsPerBlock = 8;
constexpr int kFeaturesPerLane = 8;  // a pass holds 256 features of each gradient in registers
constexpr int kFeaturesPerPass = kFeaturesPerLane * kWarpSize;

/// The tensors of one query head, as rows.
template <typename T>
struct Head {
  const T *query, *key, *value, *dout;
  const float *lse, *lse_rest, *delta;  // lse_rest: null for 0
  HeadIndex index;
  int64_t bias_offset;

  __device__ Head(const AttentionBackwardArgs& a, const HeadIndex& i)
      : query(RowPointer(static_cast<const T*>(a.query), a.query_strides, i.batch, i.head, 0)),
        key(RowPointer(static_cast<const T*>(a.key), a.key_strides, i.batch, i.kv_head, 0)),
        value(RowPointer(static_cast<const T*>(a.value), a.value_strides, i.batch, i.kv_head, 0)),
        dout(RowPointer(static_cast<const T*>(a.dout), a.out_strides, i.batch, i.head, 0)),
        lse(a.lse + FirstRow(a, i)),
        lse_rest(a.lse_rest ? a.lse_rest + FirstRow(a, i) : nullptr),
        delta(a.delta + FirstRow(a, i)),
        index(i),
        bias_offset(ScoreOffset(a.bias_strides, i)) {}
};

template <typename T>
__device__ float Dot(const T* a, const T* b, int64_t size) {
  float sum = 0;
  for (int64_t d = 0; d < size; ++d) sum += ToFloat(a[d]) * ToFloat(b[d]);
  return sum;
}

struct Weights {
  float p, dlogit, dproduct;  // the last without the scale
};

/// The weights of score (t, s), which must lie in the band; zeros where it is forbidden.
template <typename T>
__device__ Weights WeightsAt(const AttentionBackwardArgs& a, const Head<T>& h, int64_t t,
                             int64_t s) {
  if (!IsAllowed(a, h.index, t, s)) return {0, 0, 0};
  const float lse = h.lse[t];
  if (lse == -INFINITY && a.masked_row == MaskedRow::kMean) return {0, 0, 0};  // dead rows: below
  const Capped capped = Cap(a, a.scale * Dot(h.query + t * a.query_strides.length,
                                             h.key + s * a.key_strides.length, a.qk_dim));
  float logit = capped.logit;
  if (a.bias)
    logit += LoadBias(a, h.bias_offset + t * a.bias_strides.query + s * a.bias_strides.key);
  const float p = expf(logit - lse - (h.lse_rest ? h.lse_rest[t] : 0.f));
  const float dp =
      Dot(h.dout + t * a.out_strides.length, h.value + s * a.value_strides.length, a.v_dim);
  const float dlogit = p * (dp - h.delta[t]);
  return {p, dlogit, dlogit * capped.slope};
}

/// acc[i] += weight * row[first + 32 i + lane]
template <typename T>
__device__ void Accumulate(float (&acc)[kFeaturesPerLane], float weight, const T* row,
                           int64_t first, int64_t size) {
  for (int i = 0; i < kFeaturesPerLane; ++i) {
    const int64_t d = first + i * kWarpSize + threadIdx.x;
    if (d < size) acc[i] += weight * ToFloat(row[d]);
  }
}

template <typename T>
__device__ void Store(T* row, const float (&acc)[kFeaturesPerLane], float factor, int64_t first,
                      int64_t size) {
  for (int i = 0; i < kFeaturesPerLane; ++i) {
    const int64_t d = first + i * kWarpSize + threadIdx.x;
    if (d < size) row[d] = FromFloat<T>(factor * acc[i]);
  }
}

/// dquery[t] = scale * sum_s dproducts[t, s] * key[s], and dbias[t, :] = dlogits[t, :].
template <typename T>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    attention_naive_dquery_kernel(const __grid_constant__ AttentionBackwardArgs args) {
  const int lane = threadIdx.x;
  const int64_t row = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.y;
  if (row >= args.batch * args.kv_heads * args.groups * args.q_len) return;  // whole warps leave
  const int64_t t = row % args.q_len;
  const HeadIndex index = HeadIndex::Of(args, row / args.q_len);
  const Head<T> head(args, index);
  const Range band = KeysInBand(args, t, t);
  float* dbias = args.dbias ? args.dbias + row * args.kv_len : nullptr;
  // dbias is dense: its zeros outside the band are written too.
  const Range keys = dbias ? Range{0, args.kv_len} : band;

  int64_t first_feature = 0;
  do {  // once at least: dbias is wanted even without features
    float acc[kFeaturesPerLane] = {};
    for (int64_t s0 = keys.begin; s0 < keys.end; s0 += kWarpSize) {
      const int64_t s = s0 + lane;
      Weights weights{0, 0, 0};
      if (s >= band.begin && s < band.end) weights = WeightsAt(args, head, t, s);
      if (dbias && first_feature == 0 && s < args.kv_len) dbias[s] = weights.dlogit;
      for (int j = 0; j < kWarpSize; ++j) {
        const float w = __shfl_sync(kAllLanes, weights.dproduct, j);
        if (w == 0) continue;  // not allowed or no key at all
        Accumulate(acc, w, head.key + (s0 + j) * args.key_strides.length, first_feature,
                   args.qk_dim);
      }
    }
    const bool nan_row = head.lse[t] == -INFINITY && args.masked_row == MaskedRow::kNan;
    T* dquery =
        RowPointer(static_cast<T*>(args.dquery), args.query_strides, index.batch, index.head, t);
    Store(dquery, acc, nan_row ? NAN : args.scale, first_feature, args.qk_dim);
    first_feature += kFeaturesPerPass;
  } while (first_feature < args.qk_dim);
}

/// dvalue[s] = sum_{group, t} p[t, s] * dout[t];  dkey[s] = scale * sum dproducts[t, s] * query[t].
/// A dead row (lse == -inf) weighs on every key, allowed or not: 1/kv_len in dvalue under kMean,
/// NaN in both under kNan. So the walk goes over all queries, not only those in the band.
template <typename T>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    attention_naive_dkey_dvalue_kernel(const __grid_constant__ AttentionBackwardArgs args) {
  const int lane = threadIdx.x;
  const int64_t row = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.y;
  if (row >= args.batch * args.kv_heads * args.kv_len) return;  // whole warps leave
  const int64_t s = row % args.kv_len;
  const int64_t kv_head = row / args.kv_len % args.kv_heads;
  const int64_t batch = row / args.kv_len / args.kv_heads;
  const Range band = QueriesInBand(args, s, s);
  const bool mean = args.masked_row == MaskedRow::kMean;
  T* dkey = RowPointer(static_cast<T*>(args.dkey), args.key_strides, batch, kv_head, s);
  T* dvalue = RowPointer(static_cast<T*>(args.dvalue), args.value_strides, batch, kv_head, s);

  for (int64_t first = 0; first < max(args.qk_dim, args.v_dim); first += kFeaturesPerPass) {
    float acc_key[kFeaturesPerLane] = {}, acc_value[kFeaturesPerLane] = {};
    for (int64_t group = 0; group < args.groups; ++group) {
      const Head<T> head(args, {batch, kv_head * args.groups + group, kv_head, group});
      for (int64_t t0 = 0; t0 < args.q_len; t0 += kWarpSize) {
        const int64_t t = t0 + lane;
        Weights weights{0, 0, 0};
        if (t < args.q_len && head.lse[t] == -INFINITY)
          weights =
              mean ? Weights{1.f / static_cast<float>(args.kv_len), 0, 0} : Weights{NAN, NAN, NAN};
        else if (t >= band.begin && t < band.end)
          weights = WeightsAt(args, head, t, s);
        for (int j = 0; j < kWarpSize; ++j) {
          const float p = __shfl_sync(kAllLanes, weights.p, j);
          const float dproduct = __shfl_sync(kAllLanes, weights.dproduct, j);
          if (p != 0)
            Accumulate(acc_value, p, head.dout + (t0 + j) * args.out_strides.length, first,
                       args.v_dim);
          if (dproduct != 0)
            Accumulate(acc_key, dproduct, head.query + (t0 + j) * args.query_strides.length, first,
                       args.qk_dim);
        }
      }
    }
    Store(dkey, acc_key, args.scale, first, args.qk_dim);
    Store(dvalue, acc_value, 1.f, first, args.v_dim);
  }
}

unsigned BlocksFor(int64_t rows) {
  return static_cast<unsigned>((rows + kWarpsPerBlock - 1) / kWarpsPerBlock);
}

constexpr dim3 kBlock(kWarpSize, kWarpsPerBlock);

}  // namespace

Status NaiveBackward(const AttentionBackwardArgs& args, const Launch& launch) {
  const int64_t queries = args.batch * args.kv_heads * args.groups * args.q_len;
  const int64_t keys = args.batch * args.kv_heads * args.kv_len;
  return DispatchDType(args.dtype, [&]<typename T>() {
    if (queries > 0)
      attention_naive_dquery_kernel<T><<<BlocksFor(queries), kBlock, 0, launch.stream>>>(args);
    if (keys > 0)
      attention_naive_dkey_dvalue_kernel<T><<<BlocksFor(keys), kBlock, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

}  // namespace zenith::attention
