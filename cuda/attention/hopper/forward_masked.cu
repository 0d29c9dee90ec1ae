#include "cuda/attention/hopper/forward.cuh"

namespace zenith::attention::hopper {

// Scores::kMasked, for head sizes up to 128. 192 queries a block at 64, but 128 with segments,
// which 192 cross more often: 8 of 512 positions take 0.59 ms with those (b4 h32 s4096, H100,
// bfloat16, 11/2026), 0.43 with 128 of Scores::kAny.
template <typename T>
Status LaunchByHead(const AttentionForwardArgs& args, const Launch& launch) {
  using D64 = ForwardConfig<T, 64, 64, 3, 128, Scores::kMasked>;
  using D64OfSegments = ForwardConfig<T, 64, 64, 2, 128, Scores::kMasked>;
  using D128 = ForwardConfig<T, 128, 128, 2, 128, Scores::kMasked>;
  if (args.qk_dim > 64 || args.v_dim > 64) return LaunchForward<D128>(args, launch);
  return args.query_segments ? LaunchForward<D64OfSegments>(args, launch)
                             : LaunchForward<D64>(args, launch);
}

Status ForwardMasked(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchByHead<__half>(args, launch)
                                   : LaunchByHead<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::attention::hopper
