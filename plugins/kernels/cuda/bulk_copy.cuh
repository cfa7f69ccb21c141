// Barriers and copies of the tensor memory accelerator (compute capability 9.0 and later), which
// CUDA C++ has no functions for.
#ifndef LMKAN_KERNELS_CUDA_BULK_COPY_CUH_
#define LMKAN_KERNELS_CUDA_BULK_COPY_CUH_

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lmkan::cuda {

#if !defined(__CUDACC__)

// Run on the CPU by the tests.
void InitBarrier(uint64_t* barrier, uint32_t arrivals);
void FenceBarriers();
void Arrive(uint64_t* barrier);
void ArriveWithBytes(uint64_t* barrier, uint32_t bytes);
void ArriveWithCopies(uint64_t* barrier);
void Wait(uint64_t* barrier, uint32_t parity);
void CopyBox(const CUtensorMap* map, char* to, int32_t byte, int32_t cell, int32_t pair,
             uint64_t* barrier);

#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ inline uint32_t SharedAddress(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

__device__ inline void InitBarrier(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}

// Lets the accelerator see barriers that this thread has made.
__device__ inline void FenceBarriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void Arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}

// Arrives, and lets the phase wait for so many bytes.
__device__ inline void ArriveWithBytes(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}

// Arrives when the thread's earlier asynchronous copies are complete.
__device__ inline void ArriveWithCopies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}

// Waits until the phase of this parity is complete.
__device__ inline void Wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait_%=;\n"
      "}" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}

// Copies a box of bytes, 128 of each of some cells of a pair.
__device__ inline void CopyBox(const CUtensorMap* map, char* to, int32_t byte, int32_t cell,
                               int32_t pair, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3, "
      "%4}], [%5];" ::"r"(SharedAddress(to)),
      "l"(map), "r"(byte), "r"(cell), "r"(pair), "r"(SharedAddress(barrier))
      : "memory");
}

#endif

}  // namespace lmkan::cuda

#endif  // LMKAN_KERNELS_CUDA_BULK_COPY_CUH_
