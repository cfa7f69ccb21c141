// The kernels of SHARED as C++.
#include "kernels/cuda/shared.cu"

namespace lmkan::cuda {

// Kernels of devices that are not emulated.
cudaError_t LoadBulk(lmkan_dtype) { return cudaSuccess; }

bool LaunchBulk(const Lookup&, const SharedPlan&, int32_t, cudaStream_t, cudaError_t*) {
  return false;
}

}  // namespace lmkan::cuda
