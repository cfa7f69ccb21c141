// bfloat16 of the emulated CUDA.
#ifndef LMKAN_TESTS_CUDA_EMULATION_CUDA_BF16_H_
#define LMKAN_TESTS_CUDA_EMULATION_CUDA_BF16_H_

#include "cuda_runtime.h"
#include "kernels/cpu/float16.h"

using __nv_bfloat16 = lmkan::cpu::BFloat16;

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  __nv_bfloat16 result;
  lmkan::cpu::FromFloat(value, &result);
  return result;
}

#endif  // LMKAN_TESTS_CUDA_EMULATION_CUDA_BF16_H_
