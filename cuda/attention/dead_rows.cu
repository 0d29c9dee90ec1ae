// What rows without an allowed key (lse == -inf) give, after kernels that know nothing of them and
// leave out NaN, dquery 0 and nothing in dkey and dvalue: MaskedRow of ffi/kernels/attention.h.
#include "cuda/attention/kernels.h"
#include "cuda/attention/problem.cuh"

namespace zenith::attention {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxFeatures = 256;
constexpr int kKeysPerBlock = 128;

/// A block looks at kThreads queries of a head. kMean: where some see no key, it averages the
/// values and writes that as their out.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    attention_dead_out_kernel(const __grid_constant__ AttentionForwardArgs args) {
  __shared__ float mean[kMaxFeatures];
  const int64_t chunks = (args.q_len + kThreads - 1) / kThreads;
  const HeadIndex head = HeadIndex::Of(args, blockIdx.x / chunks);
  const int64_t t0 = blockIdx.x % chunks * kThreads, t = t0 + threadIdx.x;
  const float* lse = args.lse + FirstRow(args, head);
  if (!__syncthreads_or(t < args.q_len && lse[t] == -INFINITY)) return;
  const T* value = RowPointer(static_cast<const T*>(args.value), args.value_strides, head.batch,
                              head.kv_head, 0);
  if (threadIdx.x < args.v_dim) {
    float sum = 0;
#pragma unroll 8
    for (int64_t s = 0; s < args.kv_len; ++s)
      sum += ToFloat(value[s * args.value_strides.length + threadIdx.x]);
    mean[threadIdx.x] = sum / static_cast<float>(args.kv_len);
  }
  __syncthreads();
  const int64_t end = min(args.q_len, t0 + kThreads);
  for (int64_t row = t0; row < end; ++row)
    if (lse[row] == -INFINITY && threadIdx.x < args.v_dim)
      RowPointer(static_cast<T*>(args.out), args.out_strides, head.batch, head.head,
                 row)[threadIdx.x] = FromFloat<T>(mean[threadIdx.x]);
}

/// A block looks at all queries that share kKeysPerBlock keys. kMean: those without a key add the
/// even share of dout to dvalue. kNan: they make dkey and dvalue NaN.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    attention_dead_dvalue_kernel(const __grid_constant__ AttentionBackwardArgs args) {
  const int64_t chunks = (args.kv_len + kKeysPerBlock - 1) / kKeysPerBlock;
  const int64_t s0 = blockIdx.x % chunks * kKeysPerBlock;
  const int64_t kv_head = blockIdx.x / chunks % args.kv_heads;
  const int64_t batch = blockIdx.x / chunks / args.kv_heads;
  const HeadIndex first{batch, kv_head * args.groups, kv_head, 0};
  const float* lse = args.lse + FirstRow(args, first);  // heads of a group are neighbours
  const int64_t rows = args.groups * args.q_len, end = min(args.kv_len, s0 + kKeysPerBlock);
  bool dead = false;
#pragma unroll 8
  for (int64_t row = threadIdx.x; row < rows; row += kThreads) dead |= lse[row] == -INFINITY;
  if (!__syncthreads_or(dead)) return;
  const bool nan = args.masked_row == MaskedRow::kNan;
  const int e = threadIdx.x;
  float share = nan ? NAN : 0.f;
  if (!nan && e < args.v_dim) {
    const T* dout =
        RowPointer(static_cast<const T*>(args.dout), args.out_strides, batch, first.head, 0);
    for (int64_t group = 0; group < args.groups; ++group)
      for (int64_t t = 0; t < args.q_len; ++t)
        if (lse[group * args.q_len + t] == -INFINITY)
          share += ToFloat(dout[group * args.out_strides.head + t * args.out_strides.length + e]);
    share /= static_cast<float>(args.kv_len);
  }
  for (int64_t s = s0; s < end; ++s) {
    T* dvalue = RowPointer(static_cast<T*>(args.dvalue), args.value_strides, batch, kv_head, s);
    T* dkey = RowPointer(static_cast<T*>(args.dkey), args.key_strides, batch, kv_head, s);
    if (e < args.v_dim) dvalue[e] = FromFloat<T>(ToFloat(dvalue[e]) + share);
    if (nan && e < args.qk_dim) dkey[e] = FromFloat<T>(NAN);
  }
}

/// kNan: dquery of queries without a key, kThreads of a head for each block.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    attention_dead_dquery_kernel(const __grid_constant__ AttentionBackwardArgs args) {
  const int64_t chunks = (args.q_len + kThreads - 1) / kThreads;
  const HeadIndex head = HeadIndex::Of(args, blockIdx.x / chunks);
  const int64_t t0 = blockIdx.x % chunks * kThreads, end = min(args.q_len, t0 + kThreads);
  const float* lse = args.lse + FirstRow(args, head);
  for (int64_t t = t0; t < end; ++t)
    if (lse[t] == -INFINITY && threadIdx.x < args.qk_dim)
      RowPointer(static_cast<T*>(args.dquery), args.query_strides, head.batch, head.head,
                 t)[threadIdx.x] = FromFloat<T>(NAN);
}

unsigned Chunks(int64_t heads, int64_t length, int64_t size) {
  return static_cast<unsigned>(heads * ((length + size - 1) / size));
}

}  // namespace

Status ForwardDeadRows(const AttentionForwardArgs& args, const Launch& launch) {
  if (args.masked_row == MaskedRow::kNan) return {};
  const unsigned blocks = Chunks(args.batch * args.kv_heads * args.groups, args.q_len, kThreads);
  return DispatchDType(args.dtype, [&]<typename T>() {
    attention_dead_out_kernel<T><<<blocks, kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

Status BackwardDeadRows(const AttentionBackwardArgs& args, bool with_dquery, const Launch& launch) {
  const unsigned key_blocks = Chunks(args.batch * args.kv_heads, args.kv_len, kKeysPerBlock);
  const unsigned query_blocks =
      Chunks(args.batch * args.kv_heads * args.groups, args.q_len, kThreads);
  return DispatchDType(args.dtype, [&]<typename T>() {
    attention_dead_dvalue_kernel<T><<<key_blocks, kThreads, 0, launch.stream>>>(args);
    if (with_dquery && args.masked_row == MaskedRow::kNan)
      attention_dead_dquery_kernel<T><<<query_blocks, kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

}  // namespace zenith::attention
