// The parts of the lookup that exist once per instruction set, and the data they exchange.
//
// A lookup of a chunk of rows has three steps:
//   find_cells   x -> for every row and pair the cell and the position inside it
//                (for INT8 tables round_weights then turns the positions into weights)
//   accumulate   for one block of outputs: sum of weights * corners into a float32 buffer
//   store        float32 buffer -> y
// The driver (lookup2d.cc) is the same for all instruction sets and never sees a vector type.
#ifndef LMKAN_KERNELS_CPU_KERNEL_H_
#define LMKAN_KERNELS_CPU_KERNEL_H_

#include <cstdint>
#include <type_traits>

namespace lmkan::cpu {

// Pairs that share a record, and that one pass over the rows accumulates together.
inline constexpr int kGroupPairs = 4;

// Outputs of the widest block.
inline constexpr int kMaxBlockOutputs = 32;

// Most of KernelSet::row_outputs.
inline constexpr int kMaxRowOutputs = 128;

// Cells of kGroupPairs neighbouring pairs of one row, and the positions inside them. round_weights
// replaces the positions by two 16-bit weights for each pair and line. Where they don't fit, the
// first cell is complemented, so that it is negative; where coarse ones don't fit either, so is the
// second, and the record keeps its positions.
struct alignas(16) CellRecord {
  int32_t cell[kGroupPairs];  // i1 * (G + 1) + i2
  union {
    float position1[kGroupPairs];
    int32_t weights1[kGroupPairs];  // of (i1, i2) below that of (i1, i2 + 1)
  };
  union {
    float position2[kGroupPairs];
    int32_t weights2[kGroupPairs];  // of (i1 + 1, i2) below that of (i1 + 1, i2 + 1)
  };
};

// An entry of an INT8 table beside its neighbour along the second axis: one multiplication of
// 16-bit integers then serves two corners.
struct Int8Pair {
  int8_t corner[2];  // (i1, i2), (i1, i2 + 1)
};

// An entry of a compact INT8 table, alone: half the memory, but more instructions. All blocks of
// such a table are kCompactBlockOutputs wide, and output o is entry CompactOffset(o) of a corner.
struct Int8Entry {
  int8_t corner;
};
inline constexpr int64_t kCompactBlockOutputs = 64;

template <class T>
inline constexpr bool kIsInt8 = std::is_same_v<T, Int8Pair> || std::is_same_v<T, Int8Entry>;

// The kernels interleave 16-bit words of a corner with those of its right neighbour, the lower or
// the upper half of every 16 bytes, and then take the lower or the upper byte of each: four
// quarters of the outputs, which this offset makes contiguous ones.
constexpr int64_t CompactOffset(int64_t output) {
  const int64_t quarter = output / 16;
  const int64_t part = output % 16 / 4;
  return 16 * part + quarter % 2 * 8 + output % 4 * 2 + quarter / 2;
}

// Index of a table of Int8Entry in the arrays of KernelSet; other tables have their lmkan_dtype.
inline constexpr int kCompactInt8 = 4;

// Fixed-point corner weights for INT8 tables are multiples of 1 / kWeightOne, coarse ones of
// kCoarseUnit / kWeightOne.
inline constexpr float kWeightOne = 16384.0f;
inline constexpr float kCoarseUnit = 8.0f;

// An Int8Entry is read as the upper byte of a 16-bit integer, so times kEntryMultiple, and divided
// by kHalvesDivisor where it meets coarse weights: otherwise the sum of a pair might not fit 32
// bits.
inline constexpr float kEntryMultiple = 256.0f;
inline constexpr float kHalvesDivisor = 8.0f;

// Positions within this distance of a cell's centre have weights below 2: 0.91 + 0.5 squared. And
// those that are below 16, for which coarse ones fit.
inline constexpr float kFarthestFit = 0.91f;
inline constexpr float kFarthestCoarseFit = 3.49f;

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

struct RoundWeightsArgs {
  CellRecord* records;  // [rows] of one group
  int64_t rows;
  int64_t num_pairs;  // of the group, 1 ... kGroupPairs
};

// One pass: a group of pairs of a block, all rows.
struct AccumulateArgs {
  const void* slices;  // the block's first corner of the group's first pair
  TableStrides strides;
  const float* scales;        // [kGroupPairs][width] / kWeightOne of an INT8 table
  int64_t num_pairs;          // 1 ... kGroupPairs
  const CellRecord* records;  // [rows]
  int64_t rows;
  int64_t width;      // outputs of this block, a multiple of the vector length
  const float* sums;  // [rows][width], of the passes before; not read by the first one
  bool is_first;
  float* out;  // the new sums: over the old ones, or a float32 y
  int64_t out_stride;
  // What the next pass reads, to be fetched meanwhile: a slice as a whole, or only the corners that
  // next_records point at. Null for neither.
  const void* next_slices;
  TableStrides next_strides;
  int64_t next_bytes;
  const CellRecord* next_records;  // [rows]
  int64_t next_pairs;
};

// One row of neighbouring blocks, all pairs.
struct AccumulateRowArgs {
  const void* slices;  // the block's first corner of pair 0
  TableStrides strides;
  const float* scales;  // [num_pairs][width] / kWeightOne of an INT8 table
  int64_t num_pairs;
  const CellRecord* records;  // the row's record of the first group
  int64_t record_stride;      // records between two groups
  int64_t num_blocks;         // more than 1 only where KernelSet::row_outputs allows it
  int64_t width;              // outputs of each block, a multiple of the vector length
  float* sums;                // [num_blocks][width]; written, not added to
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
// table, or kCompactInt8, for accumulate.
struct KernelSet {
  const char* name;
  int lanes;  // float32 values in a vector; a block's width is a multiple
  void (*find_cells[3])(const FindCellsArgs&);
  void (*round_weights)(const RoundWeightsArgs&);
  void (*accumulate[5])(const AccumulateArgs&);
  void (*accumulate_row[5])(const AccumulateRowArgs&);
  int64_t row_outputs[5];  // accumulate_row takes as many full blocks at once, but at least one
  // An INT8 table is compact if its Int8Pairs take as many bytes; table.cc says when fewer will do.
  int64_t compact_bytes;
  static constexpr int64_t kNeverCompact = INT64_MAX;  // no kernels for it
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
