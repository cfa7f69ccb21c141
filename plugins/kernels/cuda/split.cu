// SPLIT: SHARED with the pairs split among blocks, for batches that have too few rows for all
// multiprocessors. The sums of the parts are added up by a second kernel.
#include "shared_kernel.cuh"

namespace lmkan::cuda {

struct AddPartsArguments {
  const float* parts;  // [num_parts][num_sums]
  int64_t num_sums;
  int32_t num_parts;
  void* y;
  lmkan_dtype dtype;
};

namespace {

constexpr int kAddThreads = 256;
constexpr int kPartsAhead = 8;  // that are loaded before the first of them is added

}  // namespace

// Adds the parts' sums in the order of their pairs.
__global__ void __launch_bounds__(kAddThreads)
    AddPartsKernel(const __grid_constant__ AddPartsArguments arguments) {
  const int64_t step = int64_t{gridDim.x} * kAddThreads;
  for (int64_t i = int64_t{blockIdx.x} * kAddThreads + threadIdx.x; i < arguments.num_sums;
       i += step) {
    float sum = 0.0f;
    const float* at = arguments.parts + i;
#pragma unroll 1
    for (int32_t first = 0; first < arguments.num_parts; first += kPartsAhead) {
      float parts[kPartsAhead];
#pragma unroll
      for (int p = 0; p < kPartsAhead; ++p) {
        parts[p] = first + p < arguments.num_parts ? __ldg(at) : 0.0f;
        at += arguments.num_sums;
      }
#pragma unroll
      for (int p = 0; p < kPartsAhead; ++p) sum += parts[p];
    }
    StoreOutput(arguments.y, arguments.dtype, i, sum);
  }
}

namespace {

void* Advance(void* start, int64_t elements, lmkan_dtype dtype) {
  return static_cast<char*>(start) + elements * EntryBytes(dtype);
}

}  // namespace

cudaError_t LaunchSplit(const Lookup& lookup, const SplitPlan& plan, void* workspace,
                        int32_t shared_per_block, cudaStream_t stream) {
  SplitArguments arguments = {lookup, plan.shared, plan.part_pairs, static_cast<float*>(workspace)};
  Lookup& turn = arguments.lookup;
  for (int64_t first = 0; first < lookup.rows; first += plan.turn_rows) {
    turn.rows = std::min(plan.turn_rows, lookup.rows - first);
    arguments.plan.num_items = plan.num_tiles * Ceil(turn.rows, plan.shared.rows);
    turn.x = Advance(const_cast<void*>(lookup.x), FeaturesOffset(first, 0, lookup.num_pairs),
                     lookup.x_dtype);
    turn.y = Advance(lookup.y, first * lookup.num_outputs, lookup.x_dtype);
    cudaError_t error = LaunchKernel(arguments, plan.num_parts, shared_per_block, stream);
    if (error != cudaSuccess) return error;
    const AddPartsArguments sums = {arguments.parts, turn.rows * lookup.num_outputs, plan.num_parts,
                                    turn.y, lookup.x_dtype};
    error = Launch(AddPartsKernel, sums, Ceil(sums.num_sums, kAddThreads), kAddThreads, 0, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t LoadSplit(lmkan_dtype table_dtype) {
  cudaFuncAttributes ignored;
  const cudaError_t error = cudaFuncGetAttributes(&ignored, AddPartsKernel);
  return error != cudaSuccess
             ? error
             : cudaFuncGetAttributes(&ignored, Select<SplitArguments>(table_dtype));
}

}  // namespace lmkan::cuda
