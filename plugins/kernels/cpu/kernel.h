// The parts of the lookup that exist once per instruction set, and the data they exchange.
//
// A lookup of a chunk of rows has three steps:
//   find_cells   x -> for every row and pair the cell and the position inside it
//                (for INT8 tables round_positions then turns the positions into integers)
//   accumulate   for one block of outputs: sum of weights * corners into a float32 buffer
//   store        float32 buffer -> y
// The driver (lookup2d.cc) is the same for all instruction sets and never sees a vector type.
#ifndef LMKAN_KERNELS_CPU_KERNEL_H_
#define LMKAN_KERNELS_CPU_KERNEL_H_

#include <cstdint>

namespace lmkan::cpu {

// Pairs that share a record, and that one pass over the rows accumulates together.
inline constexpr int kGroupPairs = 4;

// Outputs of the widest block, and of the widest one of an INT8 table.
inline constexpr int kMaxBlockOutputs = 32;
inline constexpr int kMaxInt8BlockOutputs = 64;

// Outputs of the narrowest block of an INT8 table; the width of every block is a power of two.
inline constexpr int kMinInt8BlockOutputs = 8;

// Most of KernelSet::row_outputs.
inline constexpr int kMaxRowOutputs = 128;

// Cells of kGroupPairs neighbouring pairs of one row, and the positions inside them. For INT8
// tables round_positions replaces the positions by weights; accumulate_int8.h says how they are
// used.
struct alignas(16) CellRecord {
  int32_t cell[kGroupPairs];  // i1 * (G + 1) + i2
  union {
    float position[2][kGroupPairs];
    // Of (i1, i2), (i1, i2 + 1), (i1 + 1, i2), (i1 + 1, i2 + 1), in 1 / kWeightOne.
    int16_t weights[kGroupPairs][4];
  };
};

// What the weights of a pair add up to.
inline constexpr int kWeightOne = 16384;

// What an integer of an INT8 table becomes when it is interpolated: a multiple of 1 / kValueOne.
inline constexpr int kValueOne = 128;

// A pair of an INT8 table whose features lie beyond the grid, where weights don't fit.
struct FarPair {
  int32_t row;
  int32_t pair;  // of its group
  int32_t cell;
  int32_t weights1;  // of (i1, i2) below that of (i1, i2 + 1), 16 bits each, in units
  int32_t weights2;  // of (i1 + 1, i2) below that of (i1 + 1, i2 + 1)
  float unit;
};

// What the integers of an INT8 table stand for. Each scale is rounded to a multiple of its group's
// unit, the largest scale of the group and output over kScaleOne.
struct Int8Scales {
  const int16_t* multiples;  // [ceil(pairs / 2)][width][2]: two pairs side by side
  const float* units;        // [groups][width], over kValueOne
};

// The largest multiple of a unit: 32 bits hold the sum of a group.
inline constexpr int kScaleOne = 16384;

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
  int64_t line;   // (i1, i2) and (i1 + 1, i2)
  int64_t cell;   // (i1, i2) and (i1, i2 + 1)
  int64_t block;  // a corner in this block and in the next one
};

struct RoundPositionsArgs {
  CellRecord* records;  // [rows] of one group
  int64_t rows;
  int64_t num_pairs;   // of the group, 1 ... kGroupPairs
  FarPair* far_pairs;  // [rows * num_pairs], written by ascending rows and pairs
};

// One pass: a group of pairs of a block, all rows.
struct AccumulateArgs {
  const void* slices;  // the block's first corner of the group's first pair
  TableStrides strides;
  int64_t num_pairs;          // 1 ... kGroupPairs
  const CellRecord* records;  // [rows]
  int64_t rows;
  int64_t width;      // outputs of this block, a multiple of the vector length
  const float* sums;  // [rows][width], of the passes before; not read by the first one
  bool is_first;
  float* out;  // the new sums: over the old ones, or a float32 y
  int64_t out_stride;
  // Of an INT8 table: the group's scales and far pairs.
  Int8Scales scales;
  const FarPair* far_pairs;
  int64_t num_far_pairs;
  // What the next pass reads, to be fetched meanwhile: a slice as a whole, or only the corners that
  // next_records point at. Null for neither.
  const void* next_slices;
  int64_t next_bytes;
  const CellRecord* next_records;  // [rows]
  int64_t next_pairs;
};

// One row of neighbouring blocks, all pairs.
struct AccumulateRowArgs {
  const void* slices;  // the block's first corner of pair 0
  TableStrides strides;
  int64_t num_pairs;
  const CellRecord* records;  // the row's record of the first group
  int64_t record_stride;      // records between two groups
  int64_t num_blocks;         // more than 1 only where KernelSet::row_outputs allows it
  int64_t width;              // outputs of each block, a multiple of the vector length
  float* sums;                // [num_blocks][width]; written, not added to
  // Of an INT8 table: far pairs of all rows, and where those of each group end.
  Int8Scales scales;
  const FarPair* far_pairs;
  const int64_t* far_ends;  // [groups]
  int64_t row;
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
  int lanes;         // float32 values in a vector; a block's width is a multiple
  int int8_outputs;  // of the widest block of an INT8 table
  void (*find_cells[3])(const FindCellsArgs&);
  int64_t (*round_positions)(const RoundPositionsArgs&);  // returns the number of far pairs
  void (*accumulate[4])(const AccumulateArgs&);
  void (*accumulate_row[4])(const AccumulateRowArgs&);
  int64_t row_outputs[4];  // accumulate_row takes as many full blocks at once, but at least one
  void (*store[3])(const StoreArgs&);
};

extern const KernelSet kPortableKernels;
#if defined(LMKAN_HAVE_AVX2_KERNELS)
extern const KernelSet kAvx2Kernels;
#endif
#if defined(LMKAN_HAVE_AVX512_KERNELS)
extern const KernelSet kAvx512Kernels;
#endif

}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_KERNEL_H_
