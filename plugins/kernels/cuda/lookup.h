// What the host passes to the kernels by value, and the index arithmetic that both sides share.
#ifndef LMKAN_KERNELS_CUDA_LOOKUP_H_
#define LMKAN_KERNELS_CUDA_LOOKUP_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "grid.h"
#include "lmkan/lookup2d.h"

namespace lmkan::cuda {

// Grids of up to so many cells travel with the launch, whose parameters are limited to 4 KB; of
// larger grids the kernels compute the cells that they need.
inline constexpr int kMostPassedGrids = 250;

// Bytes that a thread loads at once: a chunk of a corner.
inline constexpr int kChunkBytes = 16;

struct Lookup {
  const void* table;    // [num_pairs][num_grids + 1][num_grids + 1][num_outputs]
  const float* scales;  // [num_pairs][num_outputs] of an INT8 table
  const void* x;        // [rows][2 * num_pairs]
  void* y;              // [rows][num_outputs]
  int64_t rows;
  int64_t num_pairs;
  int64_t num_outputs;
  int32_t num_grids;
  lmkan_dtype table_dtype;
  lmkan_dtype x_dtype;
  GridCell cells[kMostPassedGrids];  // the first num_grids, where they are no more than that

  __host__ __device__ bool passes_cells() const { return num_grids <= kMostPassedGrids; }
  __host__ __device__ int32_t points() const { return num_grids + 1; }
};

// Elements from the table's start to output 0 of a corner. Pairs and outputs have 64 bits, so that
// tables may have any size; a cell, i1 * (G + 1) + i2, has 32.
__host__ __device__ inline int64_t CornerOffset(int64_t pair, int32_t cell, int32_t points,
                                                int64_t num_outputs) {
  return (pair * (int64_t{points} * points) + cell) * num_outputs;
}

// Elements from the start of x to a pair of features.
__host__ __device__ inline int64_t FeaturesOffset(int64_t row, int64_t pair, int64_t num_pairs) {
  return 2 * (row * num_pairs + pair);
}

}  // namespace lmkan::cuda

#endif  // LMKAN_KERNELS_CUDA_LOOKUP_H_
