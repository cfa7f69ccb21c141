// The kernel of SHARED and SPLIT: copies the table slice by slice to shared memory and looks all
// rows of a block up there.
#ifndef LMKAN_KERNELS_CUDA_SHARED_KERNEL_CUH_
#define LMKAN_KERNELS_CUDA_SHARED_KERNEL_CUH_

#include <cuda_pipeline_primitives.h>

#include <type_traits>

#include "corners.cuh"
#include "launch.h"
#include "shared.cuh"

namespace lmkan::cuda {

struct SharedArguments {
  Lookup lookup;
  SharedPlan plan;
};

struct SplitArguments {
  Lookup lookup;
  SharedPlan plan;  // of a part, whose number is the block's y
  int32_t part_pairs;
  float* parts;  // [num_parts][rows][num_outputs]
};

// Starts the copy of num_cells corners of a tile, in units of kUnit bytes: those of a corner that
// exist, `tile_bytes` bytes, a multiple of kUnit. Corners lie `corner_bytes` apart.
template <int kUnit>
__device__ inline void CopyCorners(const char* from, char* to, int32_t num_cells,
                                   int64_t corner_bytes, int32_t tile_bytes) {
  constexpr int kUnits = kTileBytes / kUnit;
  for (int32_t i = threadIdx.x; i < num_cells * kUnits; i += blockDim.x) {
    const int32_t cell = i / kUnits;
    const int32_t byte = i % kUnits * kUnit;
    if (byte >= tile_bytes) continue;
    const char* const source = from + cell * corner_bytes + byte;
    char* const target = to + cell * kTileBytes + byte;
    if constexpr (kUnit >= 4) {
      __pipeline_memcpy_async(target, source, kUnit);
    } else if constexpr (kUnit == 2) {
      *reinterpret_cast<uint16_t*>(target) = __ldg(reinterpret_cast<const unsigned short*>(source));
    } else {
      *target = static_cast<char>(__ldg(reinterpret_cast<const unsigned char*>(source)));
    }
  }
}

// Starts the copy of a pair's slice, and of its scales behind it. Bytes of outputs that don't exist
// stay as they are: their sums are not stored.
template <class T>
__device__ inline void CopySlice(const Lookup& lookup, int64_t pair, int64_t tile, char* to) {
  const char* const from = reinterpret_cast<const char*>(
      static_cast<const T*>(lookup.table) +
      CornerOffset(pair, 0, lookup.points(), lookup.num_outputs) + tile);
  const int32_t num_cells = lookup.points() * lookup.points();
  const int64_t corner_bytes = lookup.num_outputs * static_cast<int64_t>(sizeof(T));
  const int64_t left = corner_bytes - tile * static_cast<int64_t>(sizeof(T));
  const int32_t tile_bytes = left < kTileBytes ? static_cast<int32_t>(left) : kTileBytes;
  if (corner_bytes % 16 == 0) {
    CopyCorners<16>(from, to, num_cells, corner_bytes, tile_bytes);
  } else if (corner_bytes % 4 == 0) {
    CopyCorners<4>(from, to, num_cells, corner_bytes, tile_bytes);
  } else {
    CopyCorners<sizeof(T)>(from, to, num_cells, corner_bytes, tile_bytes);
  }
  CopyScales<T>(lookup, pair, tile, to + num_cells * kTileBytes, threadIdx.x, blockDim.x);
}

// Loads of 16 bytes are served eight threads at a time, and conflict unless those threads read
// different chunks modulo eight. Rows of different threads need corners from anywhere, but corners
// are 128 bytes: so thread t reads chunk (k + t) mod 8 in step k. Sums stay in that order until the
// end.
template <class T, class Arguments>
__global__ void __launch_bounds__(kSharedMostThreads, 1)
    SharedKernel(const __grid_constant__ Arguments arguments) {
  constexpr bool kIsSplit = std::is_same_v<Arguments, SplitArguments>;
  constexpr int kOutputs = kChunkOutputs<T>;
  constexpr int kTileOutputs = kTileBytes / static_cast<int>(sizeof(T));
  constexpr int kRows = kShare<sizeof(T)>.rows;
  constexpr int kChunks = kShare<sizeof(T)>.chunks;
  extern __shared__ uint4 shared_memory[];
  const Lookup& lookup = arguments.lookup;
  const SharedPlan& plan = arguments.plan;
  char* const shared = reinterpret_cast<char*>(shared_memory);
  GridCell* const cells = reinterpret_cast<GridCell*>(shared);
  char* const stages = shared + plan.cell_bytes;

  // A row's chunks are shared by 8 / kChunks of the eight threads that are served together.
  const int32_t thread = threadIdx.x;
  const int32_t first_chunk = thread % kTileChunks / kChunks * kChunks;
  const int32_t own_row = thread / kTileChunks * kChunks + thread % kChunks;
  const int32_t row_step = plan.rows / kRows;
  const auto chunk_of = [&](int k) { return first_chunk + (k + thread) % kChunks; };

  const int32_t line_bytes = lookup.points() * kTileBytes;
  const int32_t slice_bytes = lookup.points() * line_bytes;
  const int32_t pairs_per_load = Features::PairsPerLoad(lookup);
  const auto num_pairs = static_cast<int32_t>(lookup.num_pairs);
  const int64_t row_blocks = (lookup.rows + plan.rows - 1) / plan.rows;
  CopyCells(lookup, cells);
  for (int64_t item = blockIdx.x; item < plan.num_items; item += gridDim.x) {
    const int64_t first_row = item % row_blocks * plan.rows;
    const int64_t rows_left = lookup.rows - first_row;
    const int32_t rows = rows_left < plan.rows ? static_cast<int32_t>(rows_left) : plan.rows;
    const int64_t tile = item / row_blocks * kTileOutputs;
    int32_t first_pair = 0;
    int32_t end = num_pairs;
    if constexpr (kIsSplit) {
      first_pair = static_cast<int32_t>(blockIdx.y) * arguments.part_pairs;
      if (end - first_pair > arguments.part_pairs) end = first_pair + arguments.part_pairs;
    }
    float sums[kRows][kChunks][kOutputs] = {};
    Features features[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int32_t row = own_row + r * row_step;
      if (row < rows) features[r].Load(lookup, first_row + row, first_pair, pairs_per_load);
    }

    // The stages may still be read by threads that are in the last item.
    __syncthreads();
    if (plan.copy_stages() == 2) {
      CopySlice<T>(lookup, first_pair, tile, stages);
      __pipeline_commit();
    }
    for (int32_t pair = first_pair; pair < end; ++pair) {
      char* stage = stages;
      if (plan.copy_stages() == 2) {
        stage += pair % 2 * plan.stage_bytes;
      } else {
        if (pair > first_pair) __syncthreads();  // nobody reads the last slice
        CopySlice<T>(lookup, pair, tile, stage);
        __pipeline_commit();
      }
      __pipeline_wait_prior(0);
      // The slice is complete, and with two stages nobody reads the other one.
      __syncthreads();
      if (plan.copy_stages() == 2 && pair + 1 < end) {
        CopySlice<T>(lookup, pair + 1, tile, stages + (pair + 1) % 2 * plan.stage_bytes);
        __pipeline_commit();
      }
      const bool loads_features = (pair + 1) % pairs_per_load == 0 && pair + 1 < end;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int32_t row = own_row + r * row_step;
        if (row >= rows) continue;
        const Place place = FindPlace(features[r].Take(lookup.x_dtype), lookup.num_grids, cells);
        // Early, so that they arrive during the sums.
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
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int32_t row = own_row + r * row_step;
      if (row >= rows) continue;
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) sums[r][k][i] *= kSumUnit<T>;
        if constexpr (kIsSplit) {
          const Results part = {arguments.parts + blockIdx.y * lookup.rows * lookup.num_outputs,
                                LMKAN_FLOAT32, lookup.num_outputs};
          StoreChunk(part, first_row + row, tile + chunk_of(k) * kOutputs, sums[r][k]);
        } else {
          StoreChunk(lookup, first_row + row, tile + chunk_of(k) * kOutputs, sums[r][k]);
        }
      }
    }
  }
}

template <class Arguments>
auto Select(lmkan_dtype table_dtype) {
  switch (table_dtype) {
    case LMKAN_FLOAT32:
      return SharedKernel<float, Arguments>;
    case LMKAN_FLOAT16:
      return SharedKernel<Float16, Arguments>;
    case LMKAN_BFLOAT16:
      return SharedKernel<BFloat16, Arguments>;
    default:
      return SharedKernel<int8_t, Arguments>;
  }
}

template <class Arguments>
cudaError_t LaunchKernel(const Arguments& arguments, int32_t parts, int32_t shared_per_block,
                         cudaStream_t stream) {
  const auto kernel = Select<Arguments>(arguments.lookup.table_dtype);
  // Always to the most, because other threads launch it with other sizes.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_per_block);
  if (error != cudaSuccess) return error;
  const SharedPlan& plan = arguments.plan;
  return Launch(kernel, arguments, plan.num_items, plan.threads, plan.shared_bytes, stream, parts);
}

}  // namespace lmkan::cuda

#endif  // LMKAN_KERNELS_CUDA_SHARED_KERNEL_CUH_
