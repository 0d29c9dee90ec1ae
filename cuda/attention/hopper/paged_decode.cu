#include "cuda/attention/hopper/decode_launch.cuh"
#include "cuda/attention/paged.h"

namespace zenith::attention::hopper {
namespace {

template <typename T>
Status DecodeByCap(const PagedAttentionArgs& args, const Launch& launch) {
  return args.softcap > 0 ? DecodeByHead<T, true>(args, launch)
                          : DecodeByHead<T, false>(args, launch);
}

}  // namespace

Status PagedDecode(const PagedAttentionArgs& args, const Launch& launch) {
  return args.dtype == DType::kF16 ? DecodeByCap<__half>(args, launch)
                                   : DecodeByCap<__nv_bfloat16>(args, launch);
}

}  // namespace zenith::attention::hopper
