// The part of CUDA's driver interface that the kernels use: maps of tensors for the tensor memory
// accelerator.
#ifndef LMKAN_TESTS_CUDA_EMULATION_CUDA_H_
#define LMKAN_TESTS_CUDA_EMULATION_CUDA_H_

#include <cstdint>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

// Of bytes in three dimensions, the first one contiguous.
struct alignas(64) CUtensorMap {
  const char* start;
  uint64_t sizes[3];
  uint64_t strides[2];  // bytes between neighbours in the second and the third dimension
  uint32_t box[3];
};

#endif  // LMKAN_TESTS_CUDA_EMULATION_CUDA_H_
