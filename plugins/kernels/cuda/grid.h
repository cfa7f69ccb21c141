// The grid's cells, computed in float64 and rounded once.
#ifndef LMKAN_KERNELS_CUDA_GRID_H_
#define LMKAN_KERNELS_CUDA_GRID_H_

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace lmkan::cuda {

// A cell of an axis: position = (x - point) * inverse_width.
struct alignas(8) GridCell {
  float point;
  float inverse_width;
};

// Point `index`, 1 ... G - 1, of a grid of G cells: σ⁻¹(index / G), where σ(x) = ½·e^x for x ≤ 0
// and 1 − ½·e^−x for x > 0.
__host__ __device__ inline double InnerPoint(int32_t num_grids, int32_t index) {
  const bool is_low = 2 * index <= num_grids;
  const double part = 2.0 * (is_low ? index : num_grids - index) / num_grids;
  return is_low ? log(part) : -log(part);
}

// Point `index`, 0 ... G: the outermost cells are as wide as their neighbours.
__host__ __device__ inline double GridPoint(int32_t num_grids, int32_t index) {
  if (index > 0 && index < num_grids) return InnerPoint(num_grids, index);
  const int32_t inner = index == 0 ? 1 : num_grids - 1;
  const int32_t next = index == 0 ? 2 : num_grids - 2;
  return 2.0 * InnerPoint(num_grids, inner) - InnerPoint(num_grids, next);
}

// The cell between two neighbouring points.
__host__ __device__ inline GridCell MakeGridCell(double point, double next) {
  return {static_cast<float>(point), static_cast<float>(1.0 / (next - point))};
}

// Cell `index`, 0 ... G - 1.
__host__ __device__ inline GridCell MakeGridCell(int32_t num_grids, int32_t index) {
  return MakeGridCell(GridPoint(num_grids, index), GridPoint(num_grids, index + 1));
}

}  // namespace lmkan::cuda

#endif  // LMKAN_KERNELS_CUDA_GRID_H_
