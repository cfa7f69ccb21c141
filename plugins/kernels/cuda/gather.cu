// GATHER: reads the four corners that each row and pair needs straight from global memory. All
// tables, any number of rows; the tactic of small batches.
#include "corners.cuh"
#include "launch.h"

namespace lmkan::cuda {

struct GatherArguments {
  Lookup lookup;
  GatherPlan plan;
};

namespace {

// Loads a chunk whose first `valid` entries exist, entry by entry because it may lie anywhere.
__device__ inline uint4 LoadEntries(const float* at, int valid) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = i < valid ? __float_as_uint(__ldg(at + i)) : 0;
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ inline uint32_t LoadBits(const int8_t* at) {
  return __ldg(reinterpret_cast<const unsigned char*>(at));
}

template <class T>
__device__ inline uint32_t LoadBits(const T* at) {
  return __ldg(reinterpret_cast<const unsigned short*>(at));
}

template <class T>
__device__ inline uint4 LoadEntries(const T* at, int valid) {
  constexpr int kEntries = 4 / static_cast<int>(sizeof(T));
  constexpr int kBits = 8 * static_cast<int>(sizeof(T));
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = 0;
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      if (i * kEntries + e < valid) words[i] |= LoadBits(at + i * kEntries + e) << (e * kBits);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <class T, bool kAligned>
__device__ inline uint4 LoadChunk(const T* at, int valid) {
  if constexpr (kAligned) {
    return __ldg(reinterpret_cast<const uint4*>(at));
  } else {
    return LoadEntries(at, valid);
  }
}

// Scales of a chunk, for AddChunk.
template <bool kAligned>
struct GlobalScales {
  const float* at;
  int valid;

  __device__ float4 operator()(int word) const {
    if constexpr (kAligned) {
      return __ldg(reinterpret_cast<const float4*>(at) + word);
    } else {
      float scales[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) scales[i] = 4 * word + i < valid ? __ldg(at + 4 * word + i) : 0;
      return make_float4(scales[0], scales[1], scales[2], scales[3]);
    }
  }
};

// Finds the places of some pairs of the block's rows. Barriers are the caller's.
__device__ inline void FindPlaces(const Lookup& lookup, const GridCell* cells, int64_t first_row,
                                  int32_t rows, int64_t first_pair, int32_t pairs,
                                  int32_t row_stride, Place* places) {
  for (int32_t i = threadIdx.x; i < rows * pairs; i += blockDim.x) {
    const int32_t r = i / pairs;
    const int32_t p = i % pairs;
    Features features;
    features.Load(lookup, first_row + r, first_pair + p, 1);
    const float2 pair = features.Take(lookup.x_dtype);
    places[r * row_stride + p] = lookup.passes_cells() ? FindPlace(pair, lookup.num_grids, cells)
                                                       : FindPlace(pair, lookup.num_grids);
  }
}

}  // namespace

// kAligned: every corner, and every row of scales, is aligned to 16 bytes.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kGatherMostThreads, kAligned ? 2 : 1)
    GatherKernel(const __grid_constant__ GatherArguments arguments) {
  constexpr int kOutputs = kChunkOutputs<T>;
  [[maybe_unused]] constexpr int kUnroll =
      kAligned ? 2 : 1;  // pairs whose loads are in flight together
  extern __shared__ uint4 shared_memory[];
  const Lookup& lookup = arguments.lookup;
  const GatherPlan& plan = arguments.plan;
  char* const shared = reinterpret_cast<char*>(shared_memory);
  GridCell* const cells = reinterpret_cast<GridCell*>(shared);
  Place* const places = reinterpret_cast<Place*>(shared + plan.cell_bytes);
  float* const group_sums = reinterpret_cast<float*>(places);  // [splits][rows][tile_outputs]

  const int32_t thread = threadIdx.x;
  const int32_t lane = thread % plan.lanes;
  const int32_t split = thread / plan.lanes % plan.splits;
  const int32_t row = thread / plan.lanes / plan.splits;
  const int32_t tile_outputs = plan.lanes * kOutputs;
  const int64_t row_blocks = (lookup.rows + plan.rows - 1) / plan.rows;
  const int64_t line = lookup.points() * lookup.num_outputs;

  CopyCells(lookup, cells);
  __syncthreads();
  for (int64_t item = blockIdx.x; item < plan.num_items; item += gridDim.x) {
    const int64_t first_row = item % row_blocks * plan.rows;
    const int64_t tile = item / row_blocks * tile_outputs;
    const int64_t left = lookup.rows - first_row;
    const int32_t rows = left < plan.rows ? static_cast<int32_t>(left) : plan.rows;
    const int64_t output = tile + lane * kOutputs;
    const int64_t outputs_left = lookup.num_outputs - output;
    const int valid = outputs_left < kOutputs ? static_cast<int>(outputs_left) : kOutputs;
    const T* const column = static_cast<const T*>(lookup.table) + output;
    float sums[kOutputs] = {};

    for (int64_t first_pair = 0; first_pair < lookup.num_pairs; first_pair += plan.pairs) {
      const int64_t pairs_left = lookup.num_pairs - first_pair;
      const int32_t pairs = pairs_left < plan.pairs ? static_cast<int32_t>(pairs_left) : plan.pairs;
      FindPlaces(lookup, cells, first_row, rows, first_pair, pairs, plan.pairs, places);
      __syncthreads();
      if (valid > 0 && row < rows) {
#pragma unroll kUnroll
        for (int32_t p = split; p < pairs; p += plan.splits) {
          const Place place = places[row * plan.pairs + p];
          const int64_t pair = first_pair + p;
          const T* const corner =
              column + CornerOffset(pair, place.cell, lookup.points(), lookup.num_outputs);
          const uint4 chunks[4] = {
              LoadChunk<T, kAligned>(corner, valid),
              LoadChunk<T, kAligned>(corner + lookup.num_outputs, valid),
              LoadChunk<T, kAligned>(corner + line, valid),
              LoadChunk<T, kAligned>(corner + line + lookup.num_outputs, valid)};
          const GlobalScales<kAligned> scales = {lookup.scales + pair * lookup.num_outputs + output,
                                                 valid};
          AddChunk(chunks, Weights<T>(place), scales, sums);
        }
      }
      __syncthreads();
    }

    // The groups' sums take the places' memory; they are added in a fixed order.
    float* const own = group_sums + (split * plan.rows + row) * tile_outputs + lane * kOutputs;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) own[i] = sums[i];
    __syncthreads();
    for (int32_t i = thread; i < rows * tile_outputs; i += blockDim.x) {
      const int64_t to = tile + i % tile_outputs;
      if (to >= lookup.num_outputs) continue;
      float sum = 0.0f;
      for (int32_t s = 0; s < plan.splits; ++s) {
        sum += group_sums[s * plan.rows * tile_outputs + i];
      }
      const int64_t to_row = first_row + i / tile_outputs;
      StoreOutput(lookup.y, lookup.x_dtype, to_row * lookup.num_outputs + to, sum * kSumUnit<T>);
    }
    __syncthreads();
  }
}

namespace {

using Kernel = void (*)(GatherArguments);

template <class T>
Kernel SelectAlignment(bool is_aligned) {
  return is_aligned ? Kernel{GatherKernel<T, true>} : Kernel{GatherKernel<T, false>};
}

Kernel Select(lmkan_dtype table_dtype, bool is_aligned) {
  switch (table_dtype) {
    case LMKAN_FLOAT32:
      return SelectAlignment<float>(is_aligned);
    case LMKAN_FLOAT16:
      return SelectAlignment<Float16>(is_aligned);
    case LMKAN_BFLOAT16:
      return SelectAlignment<BFloat16>(is_aligned);
    default:
      return SelectAlignment<int8_t>(is_aligned);
  }
}

}  // namespace

cudaError_t LaunchGather(const Lookup& lookup, const GatherPlan& plan, cudaStream_t stream) {
  const int64_t chunk_outputs = kChunkBytes / EntryBytes(lookup.table_dtype);
  const Kernel kernel = Select(lookup.table_dtype, lookup.num_outputs % chunk_outputs == 0);
  return Launch(kernel, {lookup, plan}, plan.num_items, plan.threads(), plan.shared_bytes, stream);
}

cudaError_t LoadGather(lmkan_dtype table_dtype) {
  cudaFuncAttributes ignored;
  for (const bool is_aligned : {false, true}) {
    const cudaError_t error = cudaFuncGetAttributes(&ignored, Select(table_dtype, is_aligned));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace lmkan::cuda
