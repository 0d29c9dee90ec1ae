// The oracle of cuda/rope.cu: one thread per element. See cuda/naive.h.
#include "cuda/core/convert.cuh"
#include "cuda/core/launch.h"
#include "cuda/naive.h"

namespace zenith::naive {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void rope_kernel(RopeArgs args) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= args.rows * args.cols) return;
  const int64_t row = i / args.cols, column = i % args.cols, half = args.features / 2;
  const T* const x = static_cast<const T*>(args.x) + row * args.cols;
  T* const y = static_cast<T*>(args.y) + i;
  if (column >= args.features) {
    *y = x[column];
    return;
  }
  int64_t table_row = 0, rest = row;
  for (int axis = TableRows::kRank - 1; axis >= 0; --axis) {
    table_row += rest % args.table_rows.sizes[axis] * args.table_rows.strides[axis];
    rest /= args.table_rows.sizes[axis];
  }
  const int64_t pair = args.interleaved ? column / 2 : column % half;
  const bool is_second = args.interleaved ? column % 2 == 1 : column >= half;
  const int64_t other = args.interleaved ? column ^ 1 : is_second ? column - half : column + half;
  const int64_t width = args.whole_tables ? args.features : half;
  const float* const cos = args.cos + table_row * width;
  const float* const sin = args.sin + table_row * width;
  const int64_t of_sin = args.transposed ? other : column;  // which of s0 and s1
  const double c = cos[args.whole_tables ? column : pair];
  const double s = sin[args.whole_tables ? of_sin : pair];
  const double sign = is_second != args.transposed ? 1 : -1;
  *y = FromFloat<T>(static_cast<float>(ToFloat(x[column]) * c + sign * ToFloat(x[other]) * s));
}

}  // namespace

Status Rope(const RopeArgs& args, const Launch& launch) {
  const int64_t size = args.rows * args.cols;
  if (size == 0) return {};
  return DispatchDType(args.dtype, [&]<typename T>() {
    const unsigned blocks = static_cast<unsigned>((size + kThreads - 1) / kThreads);
    rope_kernel<T><<<blocks, kThreads, 0, launch.stream>>>(args);
    return LastLaunch();
  });
}

}  // namespace zenith::naive
