// Attention over pages, one warp per query row, float32 arithmetic: the oracle of the decode
// kernel, and the fallback for what it does not take.
#include "cuda/attention/paged.h"
#include "cuda/attention/problem.cuh"

namespace zenith::attention {
namespace {

constexpr int kWarpsPerBlock = 4;

/// Where the row of a key lies, counted from page 0's first; and whether it is NaN instead.
struct KeyRow {
  int64_t page, token;
  bool nan;
};
__device__ KeyRow FindKey(const PagedAttentionArgs& p, const int32_t* table, int64_t s) {
  const PageEntry entry = ReadEntry(table[s / p.page_size], p.pages);
  return {entry.page, s % p.page_size, entry.outside && p.nan_outside};
}

/// A lane has every 32nd output feature. Each key is read twice: for its logit, whose maximum is
/// found first, and with its value.
template <typename T>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize)
    paged_attention_naive_kernel(const __grid_constant__ PagedAttentionArgs args) {
  const int lane = threadIdx.x;
  const int64_t row = int64_t{blockIdx.x} * kWarpsPerBlock + threadIdx.y;
  if (row >= args.batch * args.kv_heads * args.groups * args.q_len) return;  // whole warps leave
  const int64_t t = row % args.q_len,
                pool = row / args.q_len / args.groups / args.kv_heads / args.sequences;
  const HeadIndex head = HeadIndex::Of(args, row / args.q_len);
  const T* query =
      RowPointer(static_cast<const T*>(args.query), args.query_strides, head.batch, head.head, t);
  const T* key =
      RowPointer(static_cast<const T*>(args.key), args.key_strides, pool, head.kv_head, 0);
  const T* value =
      RowPointer(static_cast<const T*>(args.value), args.value_strides, pool, head.kv_head, 0);
  T* out = RowPointer(static_cast<T*>(args.out), args.out_strides, head.batch, head.head, t);
  const int32_t* table =
      args.table + head.batch * args.table_batch_stride + head.kv_head * args.table_head_stride;
  Range keys = KeysInBand(args, t, t);
  if (args.interval) {
    const int2 seen = LoadInterval(args, ScoreOffset(args.interval_strides, head), t);
    keys = {max(keys.begin, int64_t{seen.x}), min(keys.end, int64_t{seen.y})};
  }

  const auto logit = [&](int64_t s) {
    const KeyRow at = FindKey(args, table, s);
    const T* const k = key + at.page * args.key_page_stride + at.token * args.key_strides.length;
    float dot = 0;
    for (int64_t d = lane; d < args.qk_dim; d += kWarpSize)
      dot += ToFloat(query[d]) * ToFloat(k[d]);
    return at.nan ? NAN : Cap(args, args.scale * WarpAllReduce<Add>(dot)).logit;
  };
  const auto value_at = [&](int64_t s, int64_t e) {
    const KeyRow at = FindKey(args, table, s);
    const T* const v =
        value + at.page * args.value_page_stride + at.token * args.value_strides.length;
    return at.nan ? NAN : ToFloat(v[e]);
  };
  float max = -INFINITY, sum = 0;
  for (int64_t s = keys.begin; s < keys.end; ++s) max = fmaxf(max, logit(s));
  const float shift = max == -INFINITY ? 0.f : max;
  for (int64_t s = keys.begin; s < keys.end; ++s) sum += expf(logit(s) - shift);
  const bool dead = keys.begin >= keys.end;
  for (int64_t first = 0; first < args.v_dim; first += kWarpSize) {
    const int64_t e = first + lane;
    float total = 0;
    for (int64_t s = keys.begin; s < keys.end; ++s) {
      const float weight = expf(logit(s) - shift);
      if (e < args.v_dim) total += weight * value_at(s, e);
    }
    float result = total / sum;  // NaN without a key: 0 / 0
    if (dead && args.zero_masked_row) result = 0;
    if (dead && args.masked_row == MaskedRow::kMean) {
      result = 0;
      for (int64_t s = 0; e < args.v_dim && s < args.kv_len; ++s) result += value_at(s, e);
      result /= static_cast<float>(args.kv_len);
    }
    if (e < args.v_dim) out[e] = FromFloat<T>(result);
  }
  if (lane == 0) WriteLse(args, row, dead, max, logf(sum));
}

}  // namespace

Status NaivePaged(const PagedAttentionArgs& args, const Launch& launch) {
  const int64_t rows = args.batch * args.kv_heads * args.groups * args.q_len;
  if (rows == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() {
    const auto blocks = static_cast<unsigned>((rows + kWarpsPerBlock - 1) / kWarpsPerBlock);
    paged_attention_naive_kernel<T>
        <<<blocks, dim3(kWarpSize, kWarpsPerBlock), 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

}  // namespace zenith::attention
