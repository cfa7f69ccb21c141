// Sizes that suit the caches: how a table is stored, and in what parts a lookup reads it.
#ifndef LMKAN_KERNELS_CPU_TUNING_H_
#define LMKAN_KERNELS_CPU_TUNING_H_

#include <cstdint>

#include "lmkan/lookup2d.h"
#include "table.h"

namespace lmkan::cpu {

// Whether an INT8 table is stored as Int8Entries: where that is faster, or the caller wants memory
// spared, unless blocks that aren't full would waste what it saves.
bool IsCompact(const lmkan_cpu_table& table, lmkan_ownership ownership);

// Outputs of a block. One pass reads a group of pairs of a block, a slice: the narrower the block,
// the nearer to the core the slice stays, and with it the next slice that is being fetched. But a
// corner should fill a cache line.
int64_t BlockOutputs(const lmkan_cpu_table& table, lmkan_ownership ownership);

// Rows that share one pass over the table. More rows read the table less often; fewer keep records
// and sums nearer to the core. The first costs a row (G + 1)² / rows, the second grows with them,
// so the best number grows with G + 1.
int64_t ChunkRows(const lmkan_cpu_table& table);

// From how many rows on a pass fetches the next slice as a whole rather than the rows' corners:
// half as many as cells need most of a slice, in lines that are cheaper to ask for one after the
// other; from memory, a third. Of slices that are large for the second-level cache, corners fit
// longer.
int64_t WholeSliceRows(const lmkan_cpu_table& table);

}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_TUNING_H_
