// Which kernel of a linear layer with integer weights serves which problem.
#include "cuda/core/device.h"
#include "cuda/core/launch.h"
#include "cuda/core/vector.cuh"
#include "cuda/quantized_linear/kernels.h"

namespace zenith {

namespace {

constexpr int64_t kMaxSize = int64_t{1} << 24;  // places in a tile stay in 32 bits

}  // namespace

Status QuantizedLinear(const QuantizedLinearArgs& args, const Launch& launch) {
  if (args.rows == 0) return {};
  if (args.rows > kQuantizedRows) return {"at most 16 rows"};
  const int64_t step = args.transposed ? 64 : 16;
  const int64_t columns = args.transposed || args.bits == 8 ? 16 : 32;
  if ((args.k / args.groups) % step != 0 || args.n % columns != 0) {
    return {
        "k / groups must be a multiple of 16, or of 64 if transposed, and n of 16, or of 32 of "
        "4-bit weights that are not"};
  }
  if (args.k > kMaxSize || args.n > kMaxSize) return {"k and n must be at most 2^24"};
  if (!AreAligned(static_cast<const char*>(args.x), static_cast<const char*>(args.w),
                  static_cast<const char*>(args.scale), static_cast<const char*>(args.bias),
                  static_cast<const char*>(args.y))) {
    return {"x, w, scale, bias and y must begin at a multiple of 16 bytes"};
  }
  if (args.dtype == DType::kF32) return {"float16 and bfloat16 only"};
#ifdef ZENITH_HOPPER  // the module holds code for sm_90a
  if (ChoosesHopper()) {
    return args.dtype == DType::kF16 ? quantized_linear::HopperF16(args, launch)
                                     : quantized_linear::HopperBF16(args, launch);
  }
#endif
  return quantized_linear::General(args, launch);
}

}  // namespace zenith
