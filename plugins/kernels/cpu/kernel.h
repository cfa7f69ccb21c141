// The parts of the lookup that exist once per instruction set, and the data they exchange.
//
// A lookup of a chunk of rows has three steps:
//   find_cells   x -> for every row and pair the cell and the four corner weights
//   accumulate   for one block of outputs: sum of weights * corners into a float32 buffer
//   store        float32 buffer -> y
// The driver (lookup2d.cc) is the same for all instruction sets and never sees a vector type.
#ifndef LMKAN_KERNELS_CPU_KERNEL_H_
#define LMKAN_KERNELS_CPU_KERNEL_H_

#include <cstdint>

namespace lmkan::cpu {

// Pairs that share a record, and that one pass over the rows accumulates together.
inline constexpr int kGroupPairs = 4;

// Outputs of the widest block. A block of one pair must be small enough to stay in a cache.
inline constexpr int kMaxBlockOutputs = 64;

// Cells and corner weights of kGroupPairs neighbouring pairs of one row. Corner weights follow the
// table's order: (i1, i2), (i1, i2 + 1), (i1 + 1, i2), (i1 + 1, i2 + 1).
struct alignas(16) CellRecord {
  int32_t cell[kGroupPairs];  // i1 * (G + 1) + i2
  float weight[4][kGroupPairs];
};

// The grid that find_cells needs: G cells, points[G + 1], inverse_widths[G].
struct Grid {
  int32_t num_grids;
  const float* points;
  const float* inverse_widths;
};

struct FindCellsArgs {
  const void* x;  // [rows][num_features], contiguous
  int64_t rows;
  int64_t num_features;  // even
  Grid grid;
  CellRecord* records;  // [ceil(num_features / 8)][rows]
};

struct AccumulateArgs {
  const void* slices;   // the block's first corner of pair 0
  int64_t pair_stride;  // elements between two pairs
  int64_t cell_stride;  // elements between two cells
  int64_t line_stride;  // elements between (i1, i2) and (i1 + 1, i2)
  int64_t num_pairs;
  const CellRecord* records;  // [ceil(num_pairs / 4)][rows]
  int64_t rows;
  int64_t width;  // outputs of this block, a multiple of the vector length
  float* sums;    // [rows][width]; written, not added to
};

struct StoreArgs {
  const float* sums;  // [rows][width]
  int64_t rows;
  int64_t width;
  void* y;           // the block's first output of the first row
  int64_t y_stride;  // elements between two rows
  int64_t outputs;   // outputs to store, at most width
};

// One instruction set. The arrays are indexed by lmkan_dtype: of x for find_cells and store, of the
// table for accumulate.
struct KernelSet {
  const char* name;
  int lanes;  // float32 values in a vector
  void (*find_cells[3])(const FindCellsArgs&);
  void (*accumulate[3])(const AccumulateArgs&);
  void (*store[3])(const StoreArgs&);
};

extern const KernelSet kPortableKernels;
#if defined(LMKAN_HAVE_X86_KERNELS)
extern const KernelSet kAvx2Kernels;
extern const KernelSet kAvx512Kernels;
#endif

}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_KERNEL_H_
