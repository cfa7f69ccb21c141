// NARROW: layers with few outputs, whose slices are small and lie side by side. A block holds those
// of as many pairs as fit and looks its rows up there, each row by the 32 threads of a warp, whose
// pairs are 32 apart.
#include <cuda_pipeline_primitives.h>

#include "corners.cuh"
#include "launch.h"

namespace lmkan::cuda {

struct NarrowArguments {
  Lookup lookup;
  NarrowPlan plan;
};

namespace {

constexpr int kWarp = 32;
constexpr unsigned int kAllLanes = 0xffffffff;
static_assert(2 * kNarrowSums == kWarp, "two threads are left for each sum");

// Rows whose features are loaded before the first of them is looked up.
constexpr int kRowsAhead = 4;

__device__ inline float Widen(float value) { return value; }
__device__ inline float Widen(Float16 value) { return WidenFloat16(value.bits).x; }
__device__ inline float Widen(BFloat16 value) { return WidenBFloat16(value.bits).x; }
__device__ inline float Widen(int8_t value) { return static_cast<float>(value); }

// Copies the slices of `pairs` pairs from `first_pair` on, a multiple of kWarp, which makes the
// start a multiple of 16 bytes. Complete after a barrier.
template <class T>
__device__ inline void CopySlices(const Lookup& lookup, int64_t first_pair, int32_t pairs,
                                  T* slices) {
  const T* const table = static_cast<const T*>(lookup.table);
  const char* const from = reinterpret_cast<const char*>(
      table + CornerOffset(first_pair, 0, lookup.points(), lookup.num_outputs));
  char* const to = reinterpret_cast<char*>(slices);
  const int32_t bytes = static_cast<int32_t>(
      CornerOffset(pairs, 0, lookup.points(), lookup.num_outputs) * int64_t{sizeof(T)});
  const int32_t whole = bytes / kChunkBytes * kChunkBytes;
  const int32_t thread = threadIdx.x;
  for (int32_t i = thread * kChunkBytes; i < whole; i += blockDim.x * kChunkBytes) {
    __pipeline_memcpy_async(to + i, from + i, kChunkBytes);
  }
  __pipeline_commit();
  if (thread < bytes - whole) {
    to[whole + thread] =
        static_cast<char>(__ldg(reinterpret_cast<const unsigned char*>(from) + whole + thread));
  }
  __pipeline_wait_prior(0);
}

// Adds up the sums of a warp's threads, the threads two by two in one order for all sums. Sum i is
// then that of the threads whose SumOf() is i.
template <int kSums>
__device__ inline float AddThreads(const float (&sums)[kSums], int32_t lane) {
  constexpr int kDistance = kSums > 1 ? kSums * kWarp / kNarrowSums / 2 : 1;
  if constexpr (kSums == 1) {
    return sums[0] + __shfl_xor_sync(kAllLanes, sums[0], kDistance);
  } else {
    const bool keeps_high = (lane & kDistance) != 0;
    float half[kSums / 2];
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) {
      const float given = keeps_high ? sums[i] : sums[i + kSums / 2];
      const float kept = keeps_high ? sums[i + kSums / 2] : sums[i];
      half[i] = kept + __shfl_xor_sync(kAllLanes, given, kDistance);
    }
    return AddThreads(half, lane);
  }
}

// The outputs of a corner, read at once where all kOutputs exist: one by one they would keep to a
// few banks.
template <class T, int kOutputs>
struct alignas(kOutputs * sizeof(T)) Corner {
  T entries[kOutputs];
};

template <class T, int kOutputs, bool kIsWhole>
__device__ inline Corner<T, kOutputs> LoadCorner(const T* at, int32_t outputs) {
  if constexpr (kIsWhole) {
    return *reinterpret_cast<const Corner<T, kOutputs>*>(at);
  } else {
    Corner<T, kOutputs> corner = {};
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) {
      if (o < outputs) corner.entries[o] = at[o];
    }
    return corner;
  }
}

__device__ inline int32_t SumOf(int32_t lane) { return lane / (kWarp / kNarrowSums); }

}  // namespace

// kOutputs outputs, or fewer where kIsWhole is false.
template <class T, int kOutputs, bool kIsWhole>
__global__ void __launch_bounds__(kNarrowThreads, 2)
    NarrowKernel(const __grid_constant__ NarrowArguments arguments) {
  constexpr int kRows = kNarrowSums / kOutputs;
  static_assert(kRows % kRowsAhead == 0, "rows are loaded so many at a time");
  extern __shared__ uint4 shared_memory[];
  const Lookup& lookup = arguments.lookup;
  const NarrowPlan& plan = arguments.plan;
  char* const shared = reinterpret_cast<char*>(shared_memory);
  GridCell* const cells = reinterpret_cast<GridCell*>(shared);
  T* const slices = reinterpret_cast<T*>(shared + plan.cell_bytes);

  const int32_t lane = threadIdx.x % kWarp;
  const int32_t outputs = kIsWhole ? kOutputs : static_cast<int32_t>(lookup.num_outputs);
  const int32_t line = lookup.points() * outputs;
  const int32_t slice = lookup.points() * line;
  const int32_t feature_bytes = lookup.x_dtype == LMKAN_FLOAT32 ? 4 : 2;
  const int64_t row_bytes = FeaturesOffset(1, 0, lookup.num_pairs) * feature_bytes;
  const char* const x = static_cast<const char*>(lookup.x);
  int64_t first_held = -1;

  CopyCells(lookup, cells);
  for (int64_t item = blockIdx.x; item < plan.num_items; item += gridDim.x) {
    const int64_t first_row = item * plan.rows() + threadIdx.x / kWarp * kRows;
    const int64_t rows_left = lookup.rows - first_row;
    const int32_t rows = rows_left < kRows ? static_cast<int32_t>(rows_left) : kRows;
    float sums[kNarrowSums] = {};

    for (int64_t first_pair = 0; first_pair < lookup.num_pairs; first_pair += plan.pairs) {
      const int64_t left = lookup.num_pairs - first_pair;
      const int32_t pairs = left < plan.pairs ? static_cast<int32_t>(left) : plan.pairs;
      if (first_pair != first_held) {
        __syncthreads();  // nobody reads the slices that are there
        CopySlices(lookup, first_pair, pairs, slices);
        __syncthreads();
        first_held = first_pair;
      }
      for (int32_t p = lane; p < pairs && rows > 0; p += kWarp) {
        const char* const own_x =
            x + FeaturesOffset(first_row, first_pair + p, lookup.num_pairs) * feature_bytes;
        const T* const own_slice = slices + p * slice;
        float scales[kOutputs];
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) {
          scales[o] = 1.0f;
          if (sizeof(T) == 1 && o < outputs) {
            scales[o] = __ldg(lookup.scales + (first_pair + p) * outputs + o);
          }
        }
#pragma unroll
        for (int ahead = 0; ahead < kRows; ahead += kRowsAhead) {
          // Zeros of rows that don't exist are looked up too, without a branch, and not stored.
          Features features[kRowsAhead] = {};
#pragma unroll
          for (int r = 0; r < kRowsAhead; ++r) {
            const int32_t row = ahead + r;
            if (row < rows) features[r].LoadAt(own_x + row * row_bytes, lookup.x_dtype, 1);
          }
#pragma unroll
          for (int r = 0; r < kRowsAhead; ++r) {
            const Place place =
                FindPlace(features[r].Take(lookup.x_dtype), lookup.num_grids, cells);
            const Weights<float> weights(place);
            const T* const corner = own_slice + place.cell * outputs;
            const int32_t offsets[4] = {0, outputs, line, line + outputs};
            float values[kOutputs] = {};
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const Corner<T, kOutputs> at =
                  LoadCorner<T, kOutputs, kIsWhole>(corner + offsets[c], outputs);
#pragma unroll
              for (int o = 0; o < kOutputs; ++o) {
                values[o] = fmaf(weights.corner[c], Widen(at.entries[o]), values[o]);
              }
            }
#pragma unroll
            for (int o = 0; o < kOutputs; ++o) {
              float& sum = sums[(ahead + r) * kOutputs + o];
              sum = sizeof(T) == 1 ? fmaf(values[o], scales[o], sum) : sum + values[o];
            }
          }
        }
      }
    }

    if (rows <= 0) continue;
    const float sum = AddThreads(sums, lane);
    const int32_t row = SumOf(lane) / kOutputs;
    const int32_t output = SumOf(lane) % kOutputs;
    if (lane % (kWarp / kNarrowSums) == 0 && row < rows && output < outputs) {
      StoreOutput(lookup.y, lookup.x_dtype, (first_row + row) * outputs + output, sum);
    }
  }
}

namespace {

using Kernel = void (*)(NarrowArguments);

template <class T>
Kernel SelectOutputs(int64_t num_outputs) {
  switch (num_outputs) {
    case 1:
      return NarrowKernel<T, 1, true>;
    case 2:
      return NarrowKernel<T, 2, true>;
    case 4:
      return NarrowKernel<T, 4, true>;
    default:
      return NarrowKernel<T, 4, false>;
  }
}

Kernel Select(lmkan_dtype table_dtype, int64_t num_outputs) {
  switch (table_dtype) {
    case LMKAN_FLOAT32:
      return SelectOutputs<float>(num_outputs);
    case LMKAN_FLOAT16:
      return SelectOutputs<Float16>(num_outputs);
    case LMKAN_BFLOAT16:
      return SelectOutputs<BFloat16>(num_outputs);
    default:
      return SelectOutputs<int8_t>(num_outputs);
  }
}

}  // namespace

cudaError_t LaunchNarrow(const Lookup& lookup, const NarrowPlan& plan, int32_t shared_per_block,
                         cudaStream_t stream) {
  const Kernel kernel = Select(lookup.table_dtype, lookup.num_outputs);
  // Always to the most, because other threads launch it with other sizes.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_per_block);
  if (error != cudaSuccess) return error;
  return Launch(kernel, {lookup, plan}, plan.blocks, kNarrowThreads, plan.shared_bytes, stream);
}

cudaError_t LoadNarrow(lmkan_dtype table_dtype, int64_t num_outputs) {
  cudaFuncAttributes ignored;
  return cudaFuncGetAttributes(&ignored, Select(table_dtype, num_outputs));
}

}  // namespace lmkan::cuda
