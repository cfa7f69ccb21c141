// SHARED: a block computes its rows of a tile from all pairs. The tactic of large batches.
#include "shared_kernel.cuh"

namespace lmkan::cuda {

cudaError_t LaunchShared(const Lookup& lookup, const SharedPlan& plan, int32_t shared_per_block,
                         cudaStream_t stream) {
  return LaunchKernel(SharedArguments{lookup, plan}, 1, shared_per_block, stream);
}

cudaError_t LoadShared(lmkan_dtype table_dtype) {
  cudaFuncAttributes ignored;
  return cudaFuncGetAttributes(&ignored, Select<SharedArguments>(table_dtype));
}

}  // namespace lmkan::cuda
