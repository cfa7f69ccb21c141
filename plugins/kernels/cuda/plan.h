// How a lookup is cut into blocks of threads, and which tactic should be the fastest. Nothing here
// touches the device.
#ifndef LMKAN_KERNELS_CUDA_PLAN_H_
#define LMKAN_KERNELS_CUDA_PLAN_H_

#include <cstddef>
#include <cstdint>

#include "lmkan/lookup2d.h"

#if defined(__CUDACC__)
#define LMKAN_HOST_DEVICE __host__ __device__
#else
#define LMKAN_HOST_DEVICE
#endif

namespace lmkan::cuda {

// What matters of a device.
struct Device {
  int32_t num_processors;    // streaming multiprocessors
  int32_t shared_per_block;  // bytes of shared memory that a block may opt in to
  bool copies_in_bulk;       // has the tensor memory accelerator, and code for it
};

// What matters of a lookup.
struct Problem {
  lmkan_dtype table_dtype;
  int64_t rows;  // at least 1
  int64_t num_pairs;
  int64_t num_outputs;
  int32_t num_grids;
};

int32_t EntryBytes(lmkan_dtype dtype);

// Rounded up.
int64_t Ceil(int64_t dividend, int64_t divisor);

// GATHER: a block computes `rows` rows of a tile of outputs. `lanes` neighbouring threads read 16
// bytes each of a corner, and `splits` such groups share the pairs of a row.
inline constexpr int kGatherMostThreads = 256;
inline constexpr int kGatherMostPlaces = 1024;

struct GatherPlan {
  int32_t lanes;
  int32_t splits;
  int32_t rows;
  int32_t pairs;       // whose places are in shared memory at a time, a multiple of splits
  int32_t cell_bytes;  // of the grid at the start of shared memory
  int32_t shared_bytes;
  int64_t num_items;  // of rows and a tile

  int32_t threads() const { return lanes * splits * rows; }
};

GatherPlan PlanGather(const Problem& problem, const Device& device);

// SHARED: a block computes `rows` rows of a tile of 128 bytes of outputs, pair by pair from a slice
// of the table, [(G+1)^2][128 bytes], in shared memory.
inline constexpr int kSharedMostThreads = 512;
inline constexpr int kTileBytes = 128;

// How the kernel for a type of entries shares the work: a thread has `rows` rows, and of each
// `chunks` of the tile's eight chunks of 16 bytes. 64 sums, half of its registers, in each case.
struct ThreadShare {
  int rows;
  int chunks;
};

template <int kEntryBytes>
inline constexpr ThreadShare kShare = {1, 8};
template <>
inline constexpr ThreadShare kShare<4> = {2, 8};
template <>
inline constexpr ThreadShare kShare<1> = {1, 4};

// Where slices are copied by hardware, more of them can be on the way, each in boxes of a few
// cells.
inline constexpr int kMostStages = 4;
inline constexpr int kMostBoxCells = 256;
inline constexpr int kBarrierBytes = 128;

struct SharedPlan {
  int32_t threads;  // a multiple of 32; 0: the slices don't fit this device
  int32_t stages;   // slices in shared memory
  int32_t boxes;    // of a slice
  int32_t box_cells;
  int32_t rows;
  int32_t cell_bytes;   // of the grid at the start of shared memory
  int32_t stage_bytes;  // of a slice, and of its scales
  int32_t shared_bytes;
  int64_t num_items;

  LMKAN_HOST_DEVICE int32_t copy_stages() const { return stages < 2 ? stages : 2; }
};

SharedPlan PlanShared(const Problem& problem, const Device& device);

// NARROW: a block has the slices of some pairs in shared memory, [pairs][(G+1)^2][num_outputs].
// Each of its warps computes as many rows as make kNarrowSums sums.
inline constexpr int kNarrowThreads = 512;
inline constexpr int kNarrowSums = 16;
inline constexpr int kNarrowMostOutputs = 4;

struct NarrowPlan {
  int32_t warp_rows;   // 0: too many outputs, or slices that don't fit this device
  int32_t pairs;       // whose slices are in shared memory at a time, a multiple of 32
  int32_t cell_bytes;  // of the grid at the start of shared memory
  int32_t shared_bytes;
  int64_t num_items;  // of rows
  int64_t blocks;     // no more than run at a time, since each copies slices

  LMKAN_HOST_DEVICE int32_t rows() const { return kNarrowThreads / 32 * warp_rows; }
};

NarrowPlan PlanNarrow(const Problem& problem, const Device& device);

// SPLIT: the same with the pairs in parts, each for other blocks, whose sums have a workspace,
// [num_parts][turn_rows][num_outputs] of float32.
struct SplitPlan {
  SharedPlan
      shared;  // of all parts of a turn; 0 threads: the slices don't fit, or there is one part
  int32_t num_parts;
  int32_t part_pairs;  // a multiple of 4; the last part may have fewer
  int64_t num_tiles;   // of outputs
  int64_t turn_rows;   // that are computed at a time, so that the workspace has a limit
};

SplitPlan PlanSplit(const Problem& problem, const Device& device);

// On any device; 0 where SPLIT can't run on one.
int64_t SplitWorkspaceBytes(const Problem& problem);

// Whether slices should be copied by hardware.
bool PrefersBulk(const Problem& problem, const Device& device);

// Whether SHARED should be faster than GATHER. False where it does not fit.
bool PrefersShared(const Problem& problem, const Device& device);

}  // namespace lmkan::cuda

#endif  // LMKAN_KERNELS_CUDA_PLAN_H_
