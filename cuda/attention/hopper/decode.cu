#include "cuda/attention/hopper/decode.cuh"

namespace zenith::attention::hopper {

// 24 or 32 KiB of buffers a warp, and with two blocks a multiprocessor about 128 KiB on their way:
// at 3 TB/s a multiprocessor is sent 25 KiB while one read is answered.
template <typename T>
Status DecodeByHead(const AttentionForwardArgs& args, const Launch& launch) {
  const int64_t dim = std::max(args.qk_dim, args.v_dim);
  return dim <= 64    ? LaunchDecode<DecodeConfig<T, 64, 32, 3, 2>>(args, launch)
         : dim <= 128 ? LaunchDecode<DecodeConfig<T, 128, 16, 3, 2>>(args, launch)
                      : LaunchDecode<DecodeConfig<T, 256, 16, 3, 1>>(args, launch);
}

Status Decode(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? DecodeByHead<__half>(args, launch)
                                   : DecodeByHead<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::attention::hopper
