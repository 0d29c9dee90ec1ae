#include "cuda/attention/hopper/forward.cuh"

namespace zenith::attention::hopper {

// Scores::kBias, for head sizes up to 128, with the plain kernels' tiles: without the code for
// masks and for what is not copied they fit.
template <typename T>
Status LaunchByHead(const AttentionForwardArgs& args, const Launch& launch) {
  using D64 = ForwardConfig<T, 64, 64, 3, 128, Scores::kBias>;
  using D128 = ForwardConfig<T, 128, 128, 2, 128, Scores::kBias>;
  return args.qk_dim <= 64 && args.v_dim <= 64 ? LaunchForward<D64>(args, launch)
                                               : LaunchForward<D128>(args, launch);
}

Status ForwardBias(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? LaunchByHead<__half>(args, launch)
                                   : LaunchByHead<__nv_bfloat16>(args, launch);
}

bool BiasAlone(const AttentionProblem& p) {
  AttentionProblem without_bias = p;
  without_bias.bias = nullptr;
  return BiasFitsTiles(p) && !IsModified(without_bias) && !MayHaveDeadRows(without_bias);
}

}  // namespace zenith::attention::hopper
