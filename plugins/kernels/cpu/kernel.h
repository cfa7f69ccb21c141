// The parts of the lookup that exist once per instruction set, and the data they exchange.
//
// A lookup of a chunk of rows has three steps:
//   find_cells   x -> for every row and pair the cell and the position inside it
//   accumulate   for one block of outputs: sum of weights * corners into a float32 buffer
//   store        float32 buffer -> y
// The driver (lookup2d.cc) is the same for all instruction sets and never sees a vector type.
#ifndef LMKAN_KERNELS_CPU_KERNEL_H_
#define LMKAN_KERNELS_CPU_KERNEL_H_

#include <cstdint>

namespace lmkan::cpu {

// Pairs that share a record, and that one pass over the rows accumulates together.
inline constexpr int kGroupPairs = 4;

// Outputs of the widest block.
inline constexpr int kMaxBlockOutputs = 32;

// Cells of kGroupPairs neighbouring pairs of one row, and the positions inside them.
struct alignas(16) CellRecord {
  int32_t cell[kGroupPairs];  // i1 * (G + 1) + i2
  float position1[kGroupPairs];
  float position2[kGroupPairs];
};

// A cell of an axis: position = (x - point) * inverse_width.
struct GridCell {
  float point;
  float inverse_width;
};

struct Grid {
  int32_t num_grids;
  const GridCell* cells;  // [num_grids]
};

struct FindCellsArgs {
  const void* x;  // [rows][num_features], contiguous
  int64_t rows;
  int64_t num_features;  // even
  Grid grid;
  CellRecord* records;  // [ceil(num_features / 8)][rows]
};

// Elements between neighbours in a block of the table.
struct TableStrides {
  int64_t pair;
  int64_t line;  // (i1, i2) and (i1 + 1, i2)
  int64_t cell;  // (i1, i2) and (i1, i2 + 1)
};

// One pass: a group of pairs of a block, all rows.
struct AccumulateArgs {
  const void* slices;  // the block's first corner of the group's first pair
  TableStrides strides;
  int64_t num_pairs;          // 1 ... kGroupPairs
  const CellRecord* records;  // [rows]
  int64_t rows;
  int64_t width;  // outputs of this block, a multiple of the vector length
  float* sums;    // [rows][width]
  bool is_first;  // write the sums instead of adding to them
  // What the next pass reads, to be fetched meanwhile: a slice as a whole, or only the corners that
  // next_records point at. Null for neither.
  const void* next_slices;
  int64_t next_bytes;
  const CellRecord* next_records;  // [rows]
  int64_t next_pairs;
};

// One row of a block, all pairs.
struct AccumulateRowArgs {
  const void* slices;  // the block's first corner of pair 0
  TableStrides strides;
  int64_t num_pairs;
  const CellRecord* records;  // the row's record of the first group
  int64_t record_stride;      // records between two groups
  int64_t width;              // outputs of this block, a multiple of the vector length
  float* sums;                // [width]; written, not added to
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
  int lanes;              // float32 values in a vector; a block's width is a multiple
  bool has_wide_vectors;  // the widest blocks of float32 have vectors of their own
  void (*find_cells[3])(const FindCellsArgs&);
  void (*accumulate[3])(const AccumulateArgs&);
  void (*accumulate_row[3])(const AccumulateRowArgs&);
  void (*store[3])(const StoreArgs&);
};

extern const KernelSet kPortableKernels;
#if defined(LMKAN_HAVE_X86_KERNELS)
extern const KernelSet kAvx2Kernels;
extern const KernelSet kAvx512Kernels;
#endif

}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_KERNEL_H_
