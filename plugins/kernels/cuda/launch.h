// Launches of the tactics.
#ifndef LMKAN_KERNELS_CUDA_LAUNCH_H_
#define LMKAN_KERNELS_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "lookup.h"
#include "plan.h"

namespace lmkan::cuda {

cudaError_t LaunchGather(const Lookup& lookup, const GatherPlan& plan, cudaStream_t stream);

// `shared_per_block` is the device's.
cudaError_t LaunchShared(const Lookup& lookup, const SharedPlan& plan, int32_t shared_per_block,
                         cudaStream_t stream);

// `workspace` is as large as the plan says.
cudaError_t LaunchSplit(const Lookup& lookup, const SplitPlan& plan, void* workspace,
                        int32_t shared_per_block, cudaStream_t stream);

cudaError_t LaunchNarrow(const Lookup& lookup, const NarrowPlan& plan, int32_t shared_per_block,
                         cudaStream_t stream);

// LaunchShared with slices copied by hardware. False where that can't be done, and nothing was
// launched.
bool LaunchBulk(const Lookup& lookup, const SharedPlan& plan, int32_t shared_per_block,
                cudaStream_t stream, cudaError_t* error);

// Whether the code that the current device, number `device`, runs can do that. Where no code was
// compiled for a device, it runs what was written for an older one, which may not.
bool HasBulkCode(int device);

// Whether the current device can run the kernels for such a table. This also loads them, so
// that later launches need not.
cudaError_t LoadGather(lmkan_dtype table_dtype);
cudaError_t LoadShared(lmkan_dtype table_dtype);
cudaError_t LoadSplit(lmkan_dtype table_dtype);
cudaError_t LoadBulk(lmkan_dtype table_dtype);
cudaError_t LoadNarrow(lmkan_dtype table_dtype, int64_t num_outputs);

// The blocks of a kernel take turns at `items` items, since a grid has less than 2^31 blocks; for
// each of `parts` parts there are as many.
template <class Arguments>
cudaError_t Launch(void (*kernel)(Arguments), const Arguments& arguments, int64_t items,
                   int32_t threads, int32_t shared_bytes, cudaStream_t stream, int32_t parts = 1) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned int>(std::min<int64_t>(items, INT32_MAX)),
                        static_cast<unsigned int>(parts));
  config.blockDim = dim3(static_cast<unsigned int>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace lmkan::cuda

#endif  // LMKAN_KERNELS_CUDA_LAUNCH_H_
