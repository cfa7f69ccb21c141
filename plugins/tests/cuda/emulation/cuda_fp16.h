// float16 of the emulated CUDA.
#ifndef LMKAN_TESTS_CUDA_EMULATION_CUDA_FP16_H_
#define LMKAN_TESTS_CUDA_EMULATION_CUDA_FP16_H_

#include "cuda_runtime.h"
#include "kernels/cpu/float16.h"

using __half = lmkan::cpu::Float16;
struct __half2 {
  __half low, high;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline float2 __half22float2(__half2 pair) {
  return {lmkan::cpu::ToFloat(pair.low), lmkan::cpu::ToFloat(pair.high)};
}
inline __half __float2half_rn(float value) {
  __half result;
  lmkan::cpu::FromFloat(value, &result);
  return result;
}

#endif  // LMKAN_TESTS_CUDA_EMULATION_CUDA_FP16_H_
