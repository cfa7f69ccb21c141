// The part of CUDA that the kernels use, in C++: every block's threads run as fibers on the calling
// thread, so that the very source of the kernels runs, and can be checked, without a GPU.
//
// Copies that a thread starts happen when it waits for them. Between two barriers threads run one
// after the other, forwards or backwards in turn, so that a missing barrier shows. A barrier that
// not all threads of a block reach ends the program, as does a wait for what never happens.
#ifndef LMKAN_TESTS_CUDA_EMULATION_CUDA_RUNTIME_H_
#define LMKAN_TESTS_CUDA_EMULATION_CUDA_RUNTIME_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  // NOLINTNEXTLINE: converts implicitly, as CUDA's does
  dim3(unsigned int size = 1, unsigned int second = 1) : x(size), y(second) {}
  unsigned int x, y, z = 1;
};

inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- Device functions
// -----------------------------------------------------------------------------------

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

void __syncthreads();
void __syncwarp();

// What the thread whose lane differs in the bits of `distance` gives. All lanes take part.
float __shfl_xor_sync(unsigned int lanes, float given, int distance);

template <class T>
T __ldg(const T* at) {
  return *at;
}

inline float __uint_as_float(unsigned int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned int __float_as_uint(float value) {
  unsigned int bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float __expf(float x) { return std::exp2(x * 1.44269504f); }

// Nearest even; NaN and numbers beyond the range don't occur.
inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyint(value)); }

inline unsigned int __byte_perm(unsigned int low, unsigned int high, unsigned int select) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned int result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned int from = select >> (4 * i) & 7u;
    result |= static_cast<unsigned int>(bytes >> (8 * from) & 0xffu) << (8 * i);
  }
  return result;
}

// Products of two 16-bit integers and the two bytes of b from byte `first`, plus c.
inline int EmulatedDp2a(int a, int b, int c, int first) {
  const int low = static_cast<int16_t>(a) * static_cast<int8_t>(b >> (8 * first));
  const int high = (a >> 16) * static_cast<int8_t>(b >> (8 * first + 8));
  return c + low + high;
}
inline int __dp2a_lo(int a, int b, int c) { return EmulatedDp2a(a, b, c, 0); }
inline int __dp2a_hi(int a, int b, int c) { return EmulatedDp2a(a, b, c, 2); }

// --- Runtime
// --------------------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoKernelImageForDevice = 209
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaFuncAttributes {
  int ptxVersion;
};
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

#define CUDART_VERSION 12050
enum { cudaEnableDefault = 0 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0 };

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function,
                                             unsigned int version, unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* result);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);

namespace emulation {

// The device that the runtime pretends to have.
struct Device {
  int index = 0;
  cudaError_t error = cudaSuccess;  // of finding it
  cudaError_t launch_error = cudaSuccess;
  int num_processors = 8;
  int shared_per_block = 227 << 10;
  int code = 90;  // of the loaded kernels: what compute capability they were written for
  bool has_accelerator = false;  // for copies of tensors to shared memory
  bool copies_early = false;     // when it does them: at once, or when a thread waits for them
  unsigned int most_blocks = INT32_MAX;  // of a launch, so that they must take turns
};
extern Device device;

// The error that cudaGetLastError will return, and kernels that were launched so far.
extern cudaError_t last_error;
extern int64_t num_launches;

cudaError_t SetSharedLimit(const void* kernel, int bytes);
cudaError_t Run(const void* kernel, const cudaLaunchConfig_t& config,
                const std::function<void()>& thread);

}  // namespace emulation

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = emulation::device.code;
  return emulation::device.launch_error;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return emulation::SetSharedLimit(reinterpret_cast<const void*>(kernel), bytes);
}

template <class Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments),
                               const Arguments& arguments) {
  return emulation::Run(reinterpret_cast<const void*>(kernel), *config, [&] { kernel(arguments); });
}

#endif  // LMKAN_TESTS_CUDA_EMULATION_CUDA_RUNTIME_H_
