// A lookup table laid out for the CPU kernels.
#ifndef LMKAN_KERNELS_CPU_TABLE_H_
#define LMKAN_KERNELS_CPU_TABLE_H_

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "kernel.h"
#include "lmkan/lookup2d.h"

namespace lmkan::cpu {

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

template <class T>
using Buffer = std::unique_ptr<T, FreeMemory>;

// Zero-filled, aligned to cache lines; large ones ask for huge pages, because lookups are random
// accesses. Null when there is no memory.
void* AllocateAligned(size_t bytes);

// Neighbouring outputs that one accumulate call handles.
struct Block {
  int64_t first_output;
  int64_t outputs;  // that exist
  int64_t width;    // rounded up to whole vectors
  int64_t offset;   // elements from the table's start to the block's first corner
  int64_t scales;   // elements from the scales' start to the block's first
  lmkan::cpu::TableStrides strides;
};

}  // namespace lmkan::cpu

// The handle of the C interface. A copied table is stored block by block,
// [block][pair][cell][width]: one pair of a block is contiguous, so it occupies all sets of a cache
// evenly, which rows of a power of two outputs would not. Entries of INT8 tables become Int8Pairs,
// in compact ones Int8Entries.
struct lmkan_cpu_table {
  const lmkan::cpu::KernelSet* kernels = nullptr;
  lmkan_dtype dtype = LMKAN_FLOAT32;
  int64_t num_pairs = 0;
  int64_t num_grids = 0;
  int64_t num_outputs = 0;
  int64_t block_outputs = 0;  // of all blocks but the last
  int64_t num_blocks = 0;
  int64_t chunk_rows = 0;        // about as many share a pass
  int64_t whole_slice_rows = 0;  // from which passes fetch whole slices, below that corners
  bool packed = false;
  bool compact = false;  // an INT8 table of Int8Entries
  const void* data = nullptr;
  lmkan::cpu::Buffer<void> storage;  // owns data when packed
  lmkan::cpu::Buffer<float> scales;  // INT8: [block][pair][width], for the kernels' integers
  lmkan::cpu::Buffer<lmkan::cpu::GridCell> grid_cells;  // num_grids

  // Bytes between two outputs of a stored corner.
  int64_t element_size() const { return dtype == LMKAN_FLOAT32 ? 4 : compact ? 1 : 2; }
  // Of this table in the arrays of KernelSet.
  int kernel_index() const { return compact ? lmkan::cpu::kCompactInt8 : dtype; }
  int64_t num_cells() const { return (num_grids + 1) * (num_grids + 1); }
  lmkan::cpu::Grid grid() const { return {static_cast<int32_t>(num_grids), grid_cells.get()}; }
  lmkan::cpu::Block block(int64_t index) const;
};

#endif  // LMKAN_KERNELS_CPU_TABLE_H_
