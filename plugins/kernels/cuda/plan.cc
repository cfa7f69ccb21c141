#include "plan.h"

#include <algorithm>

#include "lookup.h"

namespace lmkan::cuda {
namespace {

// Bytes that a multiprocessor reads from L2 in a clock, and from its shared memory.
constexpr double kL2Bytes = 32;
constexpr double kSharedBytes = 128;

// Bytes in which L2 is read.
constexpr int32_t kSectorBytes = 32;

// Pairs of a part, and parts: fewer pairs let more multiprocessors take part, fewer parts have
// fewer sums to be added up. Of the pairs alone: the order of a row's sum must not depend on its
// batch.
constexpr int64_t kLeastPartPairs = 4;
constexpr int64_t kMostParts = 32;

int64_t PartPairs(const Problem& problem) {
  const int64_t least = Ceil(problem.num_pairs, kMostParts);
  return Ceil(std::max(least, kLeastPartPairs), 4) * 4;
}

int64_t NumParts(const Problem& problem) { return Ceil(problem.num_pairs, PartPairs(problem)); }

// What SPLIT's workspace may have, unless a single row needs more: so much stays in the L2 of large
// devices.
constexpr int64_t kMostWorkspaceBytes = 32 << 20;

// Bytes that the sums of a row take there.
int64_t RowPartsBytes(const Problem& problem) {
  return NumParts(problem) * problem.num_outputs * int64_t{sizeof(float)};
}

int64_t TurnRows(const Problem& problem) {
  int64_t most = std::max<int64_t>(kMostWorkspaceBytes / RowPartsBytes(problem), 1);
  constexpr int64_t kWhole = 256;  // rows, which fill blocks
  if (most > kWhole) most -= most % kWhole;
  return std::min(most, problem.rows);
}

// Shared memory that the system takes of each block that runs.
constexpr int32_t kBlockReserve = 1 << 10;

// Grids beyond that would leave no room for slices; it also keeps the sizes below within 32 bits.
constexpr int32_t kMostSharedGrids = 64;

// Whether SHARED can run on any device, and has pairs to split.
bool HasParts(const Problem& problem) {
  return NumParts(problem) > 1 && problem.num_grids <= kMostSharedGrids &&
         problem.num_pairs <= INT32_MAX;
}

int32_t PowerOfTwoUpTo(int64_t most) {
  int32_t power = 1;
  while (2 * int64_t{power} <= most) power *= 2;
  return power;
}

int32_t CellBytes(int32_t num_grids) {
  if (num_grids > kMostPassedGrids) return 0;
  return static_cast<int32_t>(Ceil(num_grids * int64_t{sizeof(GridCell)}, kTileBytes)) * kTileBytes;
}

int32_t TileOutputs(const Problem& problem) { return kTileBytes / EntryBytes(problem.table_dtype); }

ThreadShare ShareOf(lmkan_dtype dtype) {
  return dtype == LMKAN_FLOAT32 ? kShare<4> : dtype == LMKAN_INT8 ? kShare<1> : kShare<2>;
}

// Clocks in which the device computes one pair of all rows, or of each part, if nothing but
// bandwidth counts.
double SharedClocks(const Problem& problem, const Device& device, const SharedPlan& plan,
                    int64_t parts = 1) {
  const auto rounds = static_cast<double>(Ceil(parts * plan.num_items, device.num_processors));
  const auto rows = static_cast<double>(std::min<int64_t>(problem.rows, plan.rows));
  const double compute = rows * 4 * kTileBytes / kSharedBytes;
  const double copy = plan.stage_bytes / kL2Bytes;
  return rounds * (plan.stages >= 2 ? std::max(compute, copy) : compute + copy);
}

double GatherClocks(const Problem& problem, const Device& device) {
  const int64_t corner_bytes = problem.num_outputs * EntryBytes(problem.table_dtype);
  const double bytes = static_cast<double>(problem.rows) * 4.0 *
                       static_cast<double>(Ceil(corner_bytes, kSectorBytes) * kSectorBytes);
  return bytes / (kL2Bytes * device.num_processors);
}

}  // namespace

int32_t EntryBytes(lmkan_dtype dtype) {
  return dtype == LMKAN_FLOAT32 ? 4 : dtype == LMKAN_INT8 ? 1 : 2;
}

int64_t Ceil(int64_t dividend, int64_t divisor) {
  return dividend / divisor + (dividend % divisor != 0 ? 1 : 0);
}

GatherPlan PlanGather(const Problem& problem, const Device& device) {
  const int32_t chunk_outputs = kChunkBytes / EntryBytes(problem.table_dtype);
  const int64_t chunks = Ceil(problem.num_outputs, chunk_outputs);
  GatherPlan plan;
  // Of the pairs alone: the order of a row's sum must not depend on the batch that it came in.
  plan.splits = PowerOfTwoUpTo(std::clamp<int64_t>(problem.num_pairs / 2, 1, 32));

  // A corner's 128 bytes, or less: down to a sector if that lets more multiprocessors take part.
  plan.lanes = PowerOfTwoUpTo(std::min<int64_t>(2 * chunks - 1, kTileBytes / kChunkBytes));
  const auto num_tiles = [&] { return Ceil(chunks, plan.lanes); };
  while (plan.lanes * kChunkBytes > kSectorBytes &&
         problem.rows < Ceil(device.num_processors, num_tiles())) {
    plan.lanes /= 2;
  }

  // At least a warp, and more rows where there are plenty of blocks.
  const int64_t group = plan.lanes * plan.splits;
  const int64_t blocks = int64_t{8} * device.num_processors;
  const int64_t wanted = Ceil(problem.rows, std::max<int64_t>(1, blocks / num_tiles()));
  const int64_t least = std::max<int64_t>(1, 32 / group);
  plan.rows = static_cast<int32_t>(
      std::min(std::clamp(wanted, least, kGatherMostThreads / group), problem.rows));

  const int64_t room = kGatherMostPlaces / plan.rows / plan.splits * plan.splits;
  const int64_t needed = Ceil(problem.num_pairs, plan.splits) * plan.splits;
  plan.pairs = static_cast<int32_t>(std::min(room, needed));
  plan.cell_bytes = CellBytes(problem.num_grids);
  const int32_t place_bytes = plan.rows * plan.pairs * 16;
  const int32_t sum_bytes = plan.threads() * chunk_outputs * int32_t{sizeof(float)};
  plan.shared_bytes = plan.cell_bytes + std::max(place_bytes, sum_bytes);
  plan.num_items = num_tiles() * Ceil(problem.rows, plan.rows);
  return plan;
}

namespace {

SharedPlan PlanParts(const Problem& problem, const Device& device, int64_t parts) {
  SharedPlan plan = {};
  if (problem.num_grids > kMostSharedGrids || problem.num_pairs > INT32_MAX) return plan;
  const int32_t points = problem.num_grids + 1;
  const int32_t scale_bytes =
      problem.table_dtype == LMKAN_INT8 ? TileOutputs(problem) * int32_t{sizeof(float)} : 0;
  plan.cell_bytes = CellBytes(problem.num_grids);
  plan.boxes = static_cast<int32_t>(Ceil(points * points, kMostBoxCells));
  plan.box_cells = static_cast<int32_t>(Ceil(points * points, plan.boxes));
  plan.stage_bytes = plan.boxes * plan.box_cells * kTileBytes + scale_bytes;
  const int32_t room = device.shared_per_block - kBarrierBytes - plan.cell_bytes;
  plan.stages = std::min(kMostStages, room / plan.stage_bytes);
  if (plan.stages < 1) return {};
  plan.shared_bytes = kBarrierBytes + plan.cell_bytes + plan.stages * plan.stage_bytes;

  // More threads read fewer slices, fewer spread over more multiprocessors.
  const ThreadShare share = ShareOf(problem.table_dtype);
  double least_clocks = 0;
  SharedPlan best = {};
  for (int32_t threads = kSharedMostThreads; threads >= 128; threads /= 2) {
    plan.threads = threads;
    plan.rows = threads * share.chunks / (kTileBytes / kChunkBytes) * share.rows;
    plan.num_items =
        Ceil(problem.num_outputs, TileOutputs(problem)) * Ceil(problem.rows, plan.rows);
    const double clocks = SharedClocks(problem, device, plan, parts);
    if (best.threads != 0 && clocks >= least_clocks) continue;
    best = plan;
    least_clocks = clocks;
  }
  return best;
}

}  // namespace

SharedPlan PlanShared(const Problem& problem, const Device& device) {
  return PlanParts(problem, device, 1);
}

SplitPlan PlanSplit(const Problem& problem, const Device& device) {
  if (!HasParts(problem)) return {};
  Problem turn = problem;
  turn.rows = TurnRows(problem);
  SharedPlan shared = PlanParts(turn, device, NumParts(problem));
  // The copies by threads use no more; what others would take lets more blocks run.
  shared.shared_bytes -= (shared.stages - shared.copy_stages()) * shared.stage_bytes;
  shared.stages = shared.copy_stages();
  return {shared, static_cast<int32_t>(NumParts(problem)), static_cast<int32_t>(PartPairs(problem)),
          Ceil(problem.num_outputs, TileOutputs(problem)), turn.rows};
}

int64_t SplitWorkspaceBytes(const Problem& problem) {
  return HasParts(problem) ? TurnRows(problem) * RowPartsBytes(problem) : 0;
}

NarrowPlan PlanNarrow(const Problem& problem, const Device& device) {
  NarrowPlan plan = {};
  if (problem.num_outputs > kNarrowMostOutputs || problem.num_grids > kMostSharedGrids) return plan;
  constexpr int32_t kWarp = 32;
  const int32_t points = problem.num_grids + 1;
  const auto outputs = static_cast<int32_t>(problem.num_outputs);
  plan.cell_bytes = CellBytes(problem.num_grids);
  const int32_t warp_bytes = kWarp * points * points * outputs * EntryBytes(problem.table_dtype);

  // As much as lets two blocks run on a multiprocessor, one of which copies while the other adds;
  // or all that there is.
  const int32_t most = device.shared_per_block - plan.cell_bytes;
  const int32_t half = (device.shared_per_block - kBlockReserve) / 2 - plan.cell_bytes;
  const int64_t room = std::max(half / warp_bytes, std::min(most / warp_bytes, 1));
  if (room < 1) return {};
  plan.pairs = static_cast<int32_t>(std::min(room, Ceil(problem.num_pairs, kWarp))) * kWarp;
  plan.shared_bytes = plan.cell_bytes + plan.pairs / kWarp * warp_bytes;
  plan.warp_rows = kNarrowSums / PowerOfTwoUpTo(2 * outputs - 1);
  plan.num_items = Ceil(problem.rows, plan.rows());
  plan.blocks = std::min<int64_t>(plan.num_items, int64_t{2} * device.num_processors);
  return plan;
}

bool PrefersBulk(const Problem& problem, const Device& device) {
  // Scales of int8 tables are then copied by one warp alone, which small slices wait for (H200:
  // int8 5.9 instead of 6.7 evaluations a clock at G = 8, the same at G = 20, 5.3 instead of 4.6 at
  // G = 28).
  return device.copies_in_bulk && (problem.table_dtype != LMKAN_INT8 || problem.num_grids >= 20);
}

bool PrefersShared(const Problem& problem, const Device& device) {
  const SharedPlan plan = PlanShared(problem, device);
  if (plan.threads == 0) return false;
  return SharedClocks(problem, device, plan) < GatherClocks(problem, device);
}

}  // namespace lmkan::cuda
