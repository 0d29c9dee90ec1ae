// Oracle of quantized_linear.cu: the formula of ffi/kernels/quantized_linear.h, one thread per
// element of y.
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/naive.h"

namespace zenith::naive {
namespace {

constexpr int kThreads = 128;

__device__ int Weight(const QuantizedLinearArgs& args, int64_t i) {
  const int8_t* gW = static_cast<const int8_t*>(args.w);
  if (args.bits == 8) return gW[i];
  const int nibble = i % 2 == 0 ? gW[i / 2] & 15 : (gW[i / 2] >> 4) & 15;
  return nibble < 8 ? nibble : nibble - 16;
}

template <typename T, typename P>
__global__ void quantized_linear_kernel(QuantizedLinearArgs args) {
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= args.rows * args.n) return;
  const int64_t row = index / args.n, col = index % args.n, group = args.k / args.groups;
  const T* gX = static_cast<const T*>(args.x) + row * args.k;
  double sum = 0;
  for (int64_t i = 0; i < args.k; ++i) {
    const double scale = ToFloat(static_cast<const P*>(args.scale)[i / group * args.n + col]);
    const int weight = Weight(args, args.transposed ? col * args.k + i : i * args.n + col);
    sum += double{ToFloat(gX[i])} * weight * scale;
  }
  if (args.bias != nullptr) sum += ToFloat(static_cast<const P*>(args.bias)[col]);
  static_cast<T*>(args.y)[index] = FromFloat<T>(static_cast<float>(sum));
}

}  // namespace

Status QuantizedLinear(const QuantizedLinearArgs& args, const Launch& launch) {
  if (args.rows == 0) return {};
  const auto blocks = static_cast<unsigned>((args.rows * args.n + kThreads - 1) / kThreads);
  return DispatchDTypes(args.dtype, args.param_dtype, [&]<typename T, typename P>() {
    quantized_linear_kernel<T, P><<<blocks, kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

}  // namespace zenith::naive
