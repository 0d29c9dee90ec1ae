// SoftmaxForward of long rows, on Hopper: cuda/core/row_cluster.h. The contract is
// ffi/kernels/softmax.h.
#include "cuda/core/cluster_team.cuh"
#include "cuda/core/row_cluster_launch.h"
#include "cuda/softmax/forward.cuh"
#include "cuda/softmax/kernels.h"

namespace zenith::softmax {

Status HopperForward(const SoftmaxForwardArgs& args, const Launch& launch) {
  return DispatchDType(args.dtype, [&]<typename T>() {
    const auto launched = [&]<int kVectors>() {
      return row_cluster::LaunchRows<kVectors>(
          forward_kernel<ClusterTeam, T, kVectorSize<T>, kVectors>, args,
          args.cols / kVectorSize<T>, launch);
    };
    // Of two blocks at least (compute-sanitizer refuses less). Four 16-bit vectors a thread leave
    // room for four blocks a multiprocessor; float32's exponentials take the registers of two
    // either way.
    const int64_t vectors = args.cols / kVectorSize<T>;
    const bool four = sizeof(T) == 2 ? row_cluster::Shape<4>::Fits(vectors) : vectors <= 4096;
    return four ? launched.template operator()<4>() : launched.template operator()<8>();
  });
}

}  // namespace zenith::softmax
