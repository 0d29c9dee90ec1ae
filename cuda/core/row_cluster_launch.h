// Launches kernels for cuda/core/row_cluster.h's rows.
#pragma once

#include "cuda/core/launch.h"
#include "cuda/core/row_cluster.h"

namespace zenith::row_cluster {

/// kernel(args, threads of a cluster) with a cluster for each of args.rows, which have so many
/// vectors.
template <int kVectors, typename Args>
Status LaunchRows(void (*kernel)(Args, int), const Args& args, int64_t vectors,
                  const Launch& launch) {
  const Shape<kVectors> shape(vectors);
  const auto blocks = static_cast<unsigned>(shape.blocks);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {blocks, 1, 1};
  cudaLaunchConfig_t config = {};
  // 2^31 blocks of such rows would be over fifty terabytes.
  config.gridDim = dim3(static_cast<unsigned>(args.rows) * blocks);
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args, shape.blocks * shape.threads);
  return error == cudaSuccess ? Status{} : Status{cudaGetErrorString(error)};
}

}  // namespace zenith::row_cluster
