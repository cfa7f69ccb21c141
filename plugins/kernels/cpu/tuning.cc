// What was measured, and on what machines: docs/performance/cpu-log.md.
#include "tuning.h"

#include <algorithm>

#if defined(__linux__)
#include <unistd.h>
#endif

namespace lmkan::cpu {
namespace {

// Bytes of a core's second-level cache, or a usual size where the system doesn't say. No more than
// was measured: several cores may share a larger one.
int64_t SecondLevelCache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes < int64_t{2} << 20 ? bytes : int64_t{2} << 20;
#endif
  return int64_t{1} << 20;
}

constexpr int64_t kCacheLine = 64;

// Bytes that a pass of full blocks reads of the table.
int64_t SliceBytes(const lmkan_cpu_table& table) {
  return kGroupPairs * table.num_cells() * table.block_outputs * table.element_size();
}

}  // namespace

bool IsCompact(const lmkan_cpu_table& table, lmkan_ownership ownership) {
  if (table.dtype != LMKAN_INT8 || table.kernels->compact_bytes == KernelSet::kNeverCompact) {
    return false;
  }
  const int64_t unused = kCompactBlockOutputs - 1 - (table.num_outputs - 1) % kCompactBlockOutputs;
  if (unused > table.num_outputs / 4) return false;
  constexpr int64_t kEntryBytes = sizeof(Int8Pair);
  const int64_t bytes = table.num_pairs * table.num_cells() * table.num_outputs * kEntryBytes;
  // Where slices take much of the second-level cache, those of smaller tables arrive late too.
  const int64_t slice_bytes = kGroupPairs * table.num_cells() * kMaxBlockOutputs * kEntryBytes;
  const int64_t least = slice_bytes > SecondLevelCache() / 4 ? table.kernels->compact_bytes / 4
                                                             : table.kernels->compact_bytes;
  return ownership == LMKAN_BORROW || bytes >= least;
}

int64_t BlockOutputs(const lmkan_cpu_table& table, lmkan_ownership ownership) {
  if (table.compact) return kCompactBlockOutputs;
  // Borrowed corners lie num_outputs apart, which is no better for narrow blocks.
  if (ownership == LMKAN_BORROW && table.dtype != LMKAN_INT8) return kMaxBlockOutputs;
  const int64_t element = table.element_size();
  const int64_t widest_slice = kGroupPairs * table.num_cells() * kMaxBlockOutputs * element;
  if (widest_slice <= SecondLevelCache() / 8) return kMaxBlockOutputs;
  return kCacheLine / element;
}

int64_t ChunkRows(const lmkan_cpu_table& table) {
  constexpr int64_t kFewest = 1024;  // unless they take too much memory
  constexpr int64_t kMostRecordBytes = int64_t{16} << 20;
  constexpr int64_t kRecordBytes = sizeof(CellRecord);
  const int64_t row_bytes = table.block_outputs * int64_t{sizeof(float)} + kRecordBytes;
  const int64_t cached = SecondLevelCache() / 4 / row_bytes;
  const int64_t rows = std::max(kFewest, std::min(96 * (table.num_grids + 1), cached));
  const int64_t groups = (table.num_pairs + kGroupPairs - 1) / kGroupPairs;
  return std::clamp<int64_t>(kMostRecordBytes / (groups * kRecordBytes), 64, rows);
}

int64_t WholeSliceRows(const lmkan_cpu_table& table) {
  constexpr int64_t kEntriesInMemory = int64_t{10} << 20;
  const int64_t entries = table.num_pairs * table.num_cells() * table.num_outputs;
  const bool third = entries > kEntriesInMemory && SliceBytes(table) <= SecondLevelCache() / 4;
  return table.num_cells() / (third ? 3 : 2);
}

}  // namespace lmkan::cpu
