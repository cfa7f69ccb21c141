// From a feature to its cell and the position inside it.
#ifndef LMKAN_KERNELS_CUDA_CELLS_CUH_
#define LMKAN_KERNELS_CUDA_CELLS_CUH_

#include "grid.h"
#include "lookup.h"

namespace lmkan::cuda {

// Where a pair of features lies: the cell i1 * (G + 1) + i2, and the positions inside it, 0 ... 1,
// beyond that range in the outermost cells.
struct alignas(16) Place {
  int32_t cell;
  float position1;
  float position2;
};

// 0 ... G - 1 for every x. A NaN, for which the comparison is false, ends in cell 0.
__device__ inline int32_t FindCell(float x, int32_t num_grids) {
  const float tail = 0.5f * __expf(-fabsf(x));
  const float level = (x > 0.0f ? 1.0f - tail : tail) * static_cast<float>(num_grids);
  const int32_t cell = level > 0.0f ? static_cast<int32_t>(level) : 0;
  return cell < num_grids ? cell : num_grids - 1;
}

// `cells` are the grid's in shared memory.
__device__ inline Place FindPlace(float2 features, int32_t num_grids, const GridCell* cells) {
  const int32_t i1 = FindCell(features.x, num_grids);
  const int32_t i2 = FindCell(features.y, num_grids);
  const GridCell cell1 = cells[i1];
  const GridCell cell2 = cells[i2];
  return {i1 * (num_grids + 1) + i2, (features.x - cell1.point) * cell1.inverse_width,
          (features.y - cell2.point) * cell2.inverse_width};
}

// The same without cells, for grids that are too large to be passed.
__device__ inline Place FindPlace(float2 features, int32_t num_grids) {
  const int32_t i1 = FindCell(features.x, num_grids);
  const int32_t i2 = FindCell(features.y, num_grids);
  const GridCell cell1 = MakeGridCell(num_grids, i1);
  const GridCell cell2 = MakeGridCell(num_grids, i2);
  return {i1 * (num_grids + 1) + i2, (features.x - cell1.point) * cell1.inverse_width,
          (features.y - cell2.point) * cell2.inverse_width};
}

// Copies the passed cells to shared memory, where threads can read different ones at once. A
// barrier must follow.
__device__ inline void CopyCells(const Lookup& lookup, GridCell* cells) {
  if (!lookup.passes_cells()) return;
  for (int32_t i = threadIdx.x; i < lookup.num_grids; i += blockDim.x) cells[i] = lookup.cells[i];
}

}  // namespace lmkan::cuda

#endif  // LMKAN_KERNELS_CUDA_CELLS_CUH_
