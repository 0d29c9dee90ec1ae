#include "cuda/attention/hopper/decode_launch.cuh"

namespace zenith::attention::hopper {
namespace {

template <typename T>
Status DecodeByScores(const AttentionForwardArgs& args, const Launch& launch) {
  return args.bias || args.mask || args.query_segments || args.softcap > 0
             ? DecodeByHead<T, true>(args, launch)
             : DecodeByHead<T, false>(args, launch);
}

}  // namespace

Status Decode(const AttentionForwardArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? DecodeByScores<__half>(args, launch)
                                   : DecodeByScores<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::attention::hopper
