// Element types on the device: features in, outputs out.
#ifndef LMKAN_KERNELS_CUDA_NUMBERS_CUH_
#define LMKAN_KERNELS_CUDA_NUMBERS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "lookup.h"

namespace lmkan::cuda {

// Types of table entries; arithmetic is in float32.
struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// Two neighbours, the first one in the low half.
__device__ inline float2 WidenFloat16(uint32_t pair) {
  return __half22float2(__halves2half2(__ushort_as_half(static_cast<unsigned short>(pair)),
                                       __ushort_as_half(static_cast<unsigned short>(pair >> 16))));
}

__device__ inline float2 WidenBFloat16(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Features of a row, loaded 16 bytes at a time where every row is aligned to that, one pair at a
// time elsewhere. The type is that of the launch: its branches are the same for all threads.
struct Features {
  uint4 bits;

  __device__ static int32_t PairsPerLoad(const Lookup& lookup) {
    const int32_t most = lookup.x_dtype == LMKAN_FLOAT32 ? 2 : 4;
    return lookup.num_pairs % most == 0 ? most : 1;
  }

  // Loads pair `pair`, a multiple of PairsPerLoad, and those up to the next multiple.
  __device__ void Load(const Lookup& lookup, int64_t row, int64_t pair, int32_t pairs_per_load) {
    const int64_t offset = FeaturesOffset(row, pair, lookup.num_pairs);
    const char* const x = static_cast<const char*>(lookup.x);
    LoadAt(x + offset * (lookup.x_dtype == LMKAN_FLOAT32 ? 4 : 2), lookup.x_dtype, pairs_per_load);
  }

  // The same from the place of the pair in x.
  __device__ void LoadAt(const char* at, lmkan_dtype dtype, int32_t pairs_per_load) {
    if (pairs_per_load > 1) {
      bits = __ldg(reinterpret_cast<const uint4*>(at));
    } else if (dtype == LMKAN_FLOAT32) {
      const uint2 pair_bits = __ldg(reinterpret_cast<const uint2*>(at));
      bits.x = pair_bits.x;
      bits.y = pair_bits.y;
    } else {
      bits.x = __ldg(reinterpret_cast<const unsigned int*>(at));
    }
  }

  // The first pair, which makes room for the next.
  __device__ float2 Take(lmkan_dtype dtype) {
    if (dtype == LMKAN_FLOAT32) {
      const float2 pair = make_float2(__uint_as_float(bits.x), __uint_as_float(bits.y));
      bits.x = bits.z;
      bits.y = bits.w;
      return pair;
    }
    const float2 pair = dtype == LMKAN_FLOAT16 ? WidenFloat16(bits.x) : WidenBFloat16(bits.x);
    bits.x = bits.y;
    bits.y = bits.z;
    bits.z = bits.w;
    return pair;
  }
};

__device__ inline uint32_t NarrowFloat16(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

__device__ inline uint32_t NarrowBFloat16(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

__device__ inline void StoreOutput(void* y, lmkan_dtype dtype, int64_t index, float value) {
  if (dtype == LMKAN_FLOAT32) {
    static_cast<float*>(y)[index] = value;
  } else {
    const uint32_t bits = dtype == LMKAN_FLOAT16 ? NarrowFloat16(value) : NarrowBFloat16(value);
    static_cast<uint16_t*>(y)[index] = static_cast<uint16_t>(bits);
  }
}

// Four neighbours; index is a multiple of 4.
__device__ inline void StoreFourOutputs(void* y, lmkan_dtype dtype, int64_t index,
                                        const float* values) {
  if (dtype == LMKAN_FLOAT32) {
    *reinterpret_cast<float4*>(static_cast<float*>(y) + index) =
        make_float4(values[0], values[1], values[2], values[3]);
    return;
  }
  uint2 bits;
  if (dtype == LMKAN_FLOAT16) {
    bits.x = NarrowFloat16(values[0]) | NarrowFloat16(values[1]) << 16;
    bits.y = NarrowFloat16(values[2]) | NarrowFloat16(values[3]) << 16;
  } else {
    bits.x = NarrowBFloat16(values[0]) | NarrowBFloat16(values[1]) << 16;
    bits.y = NarrowBFloat16(values[2]) | NarrowBFloat16(values[3]) << 16;
  }
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(y) + index) = bits;
}

}  // namespace lmkan::cuda

#endif  // LMKAN_KERNELS_CUDA_NUMBERS_CUH_
