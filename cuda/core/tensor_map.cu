#include <cuda_runtime_api.h>

#include "cuda/core/matrix_map.h"
#include "cuda/core/tensor_map.h"

namespace zenith {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

/// The driver's function, without a link to libcuda: the module loads where no driver is.
Encode FindEncode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(function);
}

constexpr Status kNoEncode = {
    "the CUDA driver has no cuTensorMapEncodeTiled (it is older than 12.0)"};

}  // namespace

Status MakeTensorMap(const HeadTensor& tensor, int rows, CUtensorMap& map, int box_features) {
  static const Encode encode = FindEncode();
  if (encode == nullptr) return kNoEncode;
  constexpr cuuint64_t kBytes = 2;
  const cuuint64_t sizes[] = {
      static_cast<cuuint64_t>(tensor.features), static_cast<cuuint64_t>(tensor.length),
      static_cast<cuuint64_t>(tensor.heads), static_cast<cuuint64_t>(tensor.batch)};
  const cuuint64_t strides[] = {kBytes * static_cast<cuuint64_t>(tensor.length_stride),
                                kBytes * static_cast<cuuint64_t>(tensor.head_stride),
                                kBytes * static_cast<cuuint64_t>(tensor.batch_stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_features), static_cast<cuuint32_t>(rows), 1,
                            1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult result = encode(
      &map,
      tensor.dtype == DType::kF16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                  : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      4, const_cast<void*>(tensor.base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      box_features == kBoxFeatures ? CU_TENSOR_MAP_SWIZZLE_128B
      : box_features == 32         ? CU_TENSOR_MAP_SWIZZLE_64B
                                   : CU_TENSOR_MAP_SWIZZLE_NONE,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? Status{} : Status{"cuTensorMapEncodeTiled refused a tensor"};
}

Status MakeMatrixMap(const Matrix& matrix, int box_rows, int box_columns, bool swizzled,
                     bool promoted, CUtensorMap& map) {
  static const Encode encode = FindEncode();
  if (encode == nullptr) return kNoEncode;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(matrix.columns),
                              static_cast<cuuint64_t>(matrix.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(matrix.columns * matrix.element_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns),
                            static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result = encode(
      &map,
      matrix.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
      const_cast<void*>(matrix.base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      !swizzled                                  ? CU_TENSOR_MAP_SWIZZLE_NONE
      : box_columns * matrix.element_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                 : CU_TENSOR_MAP_SWIZZLE_128B,
      promoted ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? Status{} : Status{"cuTensorMapEncodeTiled refused a matrix"};
}

}  // namespace zenith
