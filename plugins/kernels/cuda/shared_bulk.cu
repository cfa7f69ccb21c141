// SHARED with slices that the tensor memory accelerator copies (compute capability 9.0 and later):
// no thread spends loads on them, and warps wait for slices, not for each other.
#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>

#include "launch.h"

// CUDA 12.5 brought the way to the driver's function that is used here.
#if CUDART_VERSION >= 12050

#include "bulk_copy.cuh"
#include "corners.cuh"
#include "shared.cuh"

namespace lmkan::cuda {

struct BulkArguments {
  CUtensorMap slices;
  Lookup lookup;
  SharedPlan plan;
};

template <class T>
__global__ void __launch_bounds__(kSharedMostThreads, 1)
    BulkKernel(const __grid_constant__ BulkArguments arguments) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int kOutputs = kChunkOutputs<T>;
  constexpr int kRows = kShare<sizeof(T)>.rows;
  constexpr int kChunks = kShare<sizeof(T)>.chunks;
  extern __shared__ __align__(128) uint4 shared_memory[];
  const Lookup& lookup = arguments.lookup;
  const SharedPlan& plan = arguments.plan;
  char* const shared = reinterpret_cast<char*>(shared_memory);
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared);
  uint64_t* const empty = full + kMostStages;
  GridCell* const cells = reinterpret_cast<GridCell*>(shared + kBarrierBytes);
  char* const stages = shared + kBarrierBytes + plan.cell_bytes;

  const int32_t thread = threadIdx.x;
  const int32_t lane = thread % 32;
  const int32_t first_chunk = thread % kTileChunks / kChunks * kChunks;
  const int32_t own_row = thread / kTileChunks * kChunks + thread % kChunks;
  const int32_t row_step = plan.rows / kRows;
  const auto chunk_of = [&](int k) { return first_chunk + (k + thread) % kChunks; };

  const int32_t line_bytes = lookup.points() * kTileBytes;
  const int32_t box_bytes = plan.box_cells * kTileBytes;
  const int32_t slice_bytes = plan.boxes * box_bytes;
  const int32_t num_stages = plan.stages;
  const int32_t pairs_per_load = Features::PairsPerLoad(lookup);
  const auto num_pairs = static_cast<int32_t>(lookup.num_pairs);
  const int64_t row_blocks = (lookup.rows + plan.rows - 1) / plan.rows;

  CopyCells(lookup, cells);
  if (thread == 0) {
    for (int32_t s = 0; s < num_stages; ++s) {
      InitBarrier(full + s, sizeof(T) == 1 ? 33 : 1);
      InitBarrier(empty + s, blockDim.x / 32);
    }
    FenceBarriers();
  }

  // Slices go through the stages in turn, over all items; the parity tells one round from the next.
  int32_t stage_index = 0;
  uint32_t parity = 0;
  for (int64_t item = blockIdx.x; item < plan.num_items; item += gridDim.x) {
    const int64_t first_row = item % row_blocks * plan.rows;
    const int64_t rows_left = lookup.rows - first_row;
    const int32_t rows = rows_left < plan.rows ? static_cast<int32_t>(rows_left) : plan.rows;
    const int64_t tile = item / row_blocks * (kTileBytes / static_cast<int64_t>(sizeof(T)));
    const auto tile_byte = static_cast<int32_t>(tile * static_cast<int64_t>(sizeof(T)));

    // By the first warp: starts the copy of a pair's slice to a stage that is free.
    const auto copy = [&](int32_t pair, int32_t index) {
      char* const to = stages + index * plan.stage_bytes;
      if constexpr (sizeof(T) == 1) {
        CopyScales<T>(lookup, pair, tile, to + slice_bytes, lane, 32);
        ArriveWithCopies(full + index);
      }
      if (lane == 0) {
        ArriveWithBytes(full + index, slice_bytes);
        for (int32_t box = 0; box < plan.boxes; ++box) {
          CopyBox(&arguments.slices, to + box * box_bytes, tile_byte, box * plan.box_cells, pair,
                  full + index);
        }
      }
      __syncwarp();
    };

    float sums[kRows][kChunks][kOutputs] = {};
    Features features[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int32_t row = own_row + r * row_step;
      if (row < rows) features[r].Load(lookup, first_row + row, 0, pairs_per_load);
    }
    __syncthreads();  // nobody reads the last item's slices, and barriers and cells are complete
    if (thread < 32) {
      for (int32_t pair = 0; pair < num_stages - 1 && pair < num_pairs; ++pair) {
        copy(pair, (stage_index + pair) % num_stages);
      }
    }
    for (int32_t pair = 0; pair < num_pairs; ++pair) {
      if (thread < 32 && pair + num_stages - 1 < num_pairs) {
        // To the stage of the last pair, when all warps have read it.
        const int32_t last = stage_index == 0 ? num_stages - 1 : stage_index - 1;
        if (pair > 0) Wait(empty + last, stage_index == 0 ? parity ^ 1 : parity);
        __syncwarp();
        copy(pair + num_stages - 1, last);
      }
      const char* const stage = stages + stage_index * plan.stage_bytes;
      Wait(full + stage_index, parity);
      const bool loads_features = (pair + 1) % pairs_per_load == 0 && pair + 1 < num_pairs;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int32_t row = own_row + r * row_step;
        if (row >= rows) continue;
        const Place place = FindPlace(features[r].Take(lookup.x_dtype), lookup.num_grids, cells);
        if (loads_features) features[r].Load(lookup, first_row + row, pair + 1, pairs_per_load);
        const Weights<T> weights(place);
        const char* const corner = stage + place.cell * kTileBytes;
#pragma unroll
        for (int k = 0; k < kChunks; ++k) {
          const int chunk = chunk_of(k);
          const char* const low = corner + chunk * kChunkBytes;
          const char* const high = low + line_bytes;
          const uint4 chunks[4] = {*reinterpret_cast<const uint4*>(low),
                                   *reinterpret_cast<const uint4*>(low + kTileBytes),
                                   *reinterpret_cast<const uint4*>(high),
                                   *reinterpret_cast<const uint4*>(high + kTileBytes)};
          const StageScales scales = {reinterpret_cast<const float4*>(stage + slice_bytes), chunk};
          AddChunk(chunks, weights, scales, sums[r][k]);
        }
      }
      __syncwarp();
      if (lane == 0) Arrive(empty + stage_index);
      if (++stage_index == num_stages) {
        stage_index = 0;
        parity ^= 1;
      }
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int32_t row = own_row + r * row_step;
      if (row >= rows) continue;
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) sums[r][k][i] *= kSumUnit<T>;
        StoreChunk(lookup, first_row + row, tile + chunk_of(k) * kOutputs, sums[r][k]);
      }
    }
  }
#endif
}

namespace {

using Kernel = void (*)(BulkArguments);

Kernel Select(lmkan_dtype table_dtype) {
  switch (table_dtype) {
    case LMKAN_FLOAT32:
      return BulkKernel<float>;
    case LMKAN_FLOAT16:
      return BulkKernel<Float16>;
    case LMKAN_BFLOAT16:
      return BulkKernel<BFloat16>;
    default:
      return BulkKernel<int8_t>;
  }
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// Of the driver, which the library is not linked to; null where it is older than that.
Encode FindEncode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                       cudaEnableDefault, &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<Encode>(function);
}

}  // namespace

bool HasBulkCode(int device) {
  enum : int8_t { kUnknown, kNo, kYes };
  static std::atomic<int8_t> known[64] = {};
  std::atomic<int8_t>* const cached = device < 64 ? known + device : nullptr;
  if (cached != nullptr && *cached != kUnknown) return *cached == kYes;
  cudaFuncAttributes attributes = {};
  if (cudaFuncGetAttributes(&attributes, Select(LMKAN_FLOAT32)) != cudaSuccess) {
    cudaGetLastError();  // a launch will say it
    return false;
  }
  const bool has_code = attributes.ptxVersion >= 90;
  if (cached != nullptr) *cached = has_code ? kYes : kNo;
  return has_code;
}

cudaError_t LoadBulk(lmkan_dtype table_dtype) {
  cudaFuncAttributes ignored;
  return cudaFuncGetAttributes(&ignored, Select(table_dtype));
}

bool LaunchBulk(const Lookup& lookup, const SharedPlan& plan, int32_t shared_per_block,
                cudaStream_t stream, cudaError_t* error) {
  static const Encode encode = FindEncode();
  const int64_t corner_bytes = lookup.num_outputs * EntryBytes(lookup.table_dtype);
  if (encode == nullptr || corner_bytes % 16 != 0 || corner_bytes > INT32_MAX ||
      reinterpret_cast<uintptr_t>(lookup.table) % 16 != 0) {
    return false;
  }
  BulkArguments arguments = {{}, lookup, plan};
  const int64_t cells = int64_t{lookup.points()} * lookup.points();
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(corner_bytes),
                               static_cast<cuuint64_t>(cells),
                               static_cast<cuuint64_t>(lookup.num_pairs)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(corner_bytes),
                                 static_cast<cuuint64_t>(corner_bytes * cells)};
  const cuuint32_t box[3] = {kTileBytes, static_cast<cuuint32_t>(plan.box_cells), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  if (encode(&arguments.slices, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(lookup.table),
             sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
    return false;
  }
  const Kernel kernel = Select(lookup.table_dtype);
  *error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_per_block);
  if (*error == cudaSuccess) {
    *error = Launch(kernel, arguments, plan.num_items, plan.threads, plan.shared_bytes, stream);
  }
  return true;
}

}  // namespace lmkan::cuda

#else

namespace lmkan::cuda {

bool HasBulkCode(int) { return false; }

cudaError_t LoadBulk(lmkan_dtype) { return cudaSuccess; }

bool LaunchBulk(const Lookup&, const SharedPlan&, int32_t, cudaStream_t, cudaError_t*) {
  return false;
}

}  // namespace lmkan::cuda

#endif
