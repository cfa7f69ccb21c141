// What both kernels of SHARED need: scales in shared memory, and stores.
#ifndef LMKAN_KERNELS_CUDA_SHARED_CUH_
#define LMKAN_KERNELS_CUDA_SHARED_CUH_

#include <cuda_pipeline_primitives.h>

#include "corners.cuh"
#include "plan.h"

namespace lmkan::cuda {

constexpr int kTileChunks = kTileBytes / kChunkBytes;

// Where the four scales of word `word` of chunk `chunk` lie in a stage, in units of float4: not
// side by side, so that the chunks of eight neighbouring threads are in different banks.
__device__ inline int ScaleIndex(int chunk, int word) { return word * kTileChunks + chunk; }

template <class T>
__device__ inline void CopyScales(const Lookup& lookup, int64_t pair, int64_t tile, char* to,
                                  int32_t thread, int32_t num_threads) {
  if constexpr (sizeof(T) == 1) {
    for (int32_t i = thread; i < kTileBytes && tile + i < lookup.num_outputs; i += num_threads) {
      const int index = 4 * ScaleIndex(i / kChunkBytes, i % kChunkBytes / 4) + i % 4;
      __pipeline_memcpy_async(to + 4 * index, lookup.scales + pair * lookup.num_outputs + tile + i,
                              4);
    }
  }
}

// Scales of a chunk in shared memory, for AddChunk.
struct StageScales {
  const float4* scales;
  int chunk;

  __device__ float4 operator()(int word) const { return scales[ScaleIndex(chunk, word)]; }
};

// What has the results of a lookup as far as stores need it.
struct Results {
  void* y;  // [rows][num_outputs]
  lmkan_dtype x_dtype;
  int64_t num_outputs;
};

// To a Lookup, or to Results.
template <class Target, int kOutputs>
__device__ inline void StoreChunk(const Target& target, int64_t row, int64_t output,
                                  const float (&sums)[kOutputs]) {
  const int64_t index = row * target.num_outputs + output;
  if (target.num_outputs % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kOutputs; i += 4) {
      if (output + i >= target.num_outputs) return;
      StoreFourOutputs(target.y, target.x_dtype, index + i, sums + i);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      if (output + i < target.num_outputs)
        StoreOutput(target.y, target.x_dtype, index + i, sums[i]);
    }
  }
}

}  // namespace lmkan::cuda

#endif  // LMKAN_KERNELS_CUDA_SHARED_CUH_
