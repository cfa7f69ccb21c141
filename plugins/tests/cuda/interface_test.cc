// The C interface around the CUDA kernels: arguments, tactics, devices, failing launches, offsets
// that need 64 bits. On an emulated device, which can be given any size and any failure.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "array.h"
#include "check.h"
#include "device.h"
#include "emulation/cuda_runtime.h"
#include "inputs.h"
#include "launch.h"
#include "lmkan/lookup2d_cuda.h"
#include "lookup.h"
#include "oracle.h"
#include "plan.h"
#include "table.h"

namespace lmkan::test {
namespace {

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();

alignas(16) float values[1024];

struct Call {
  lmkan_table_desc desc = {values, LMKAN_FLOAT32, 2, 4, 3, nullptr};
  const lmkan_table_desc* table = &desc;
  lmkan_dtype dtype = LMKAN_FLOAT32;
  const void* x = values;
  void* y = values + 512;
  int64_t rows = 2;
  lmkan_cuda_tactic tactic = LMKAN_CUDA_AUTO;
  void* workspace = values + 768;
  size_t workspace_size = 512;

  lmkan_status Run(char* message, size_t size) const {
    return lmkan_cuda_lookup2d(table, dtype, x, y, rows, tactic, workspace, workspace_size, nullptr,
                               message, size);
  }
};

// The call fails with one line that has `word` in it, launches nothing, and leaves no error behind.
void ExpectFailure(const Call& call, lmkan_status expected, const std::string& word) {
  const int64_t launches = emulation::num_launches;
  char message[256] = "";
  const lmkan_status status = call.Run(message, sizeof message);
  LMKAN_EXPECT(status == expected, "%s: status %d, not %d", word.c_str(), status, expected);
  LMKAN_EXPECT(std::strstr(message, word.c_str()) != nullptr, "\"%s\" does not name %s", message,
               word.c_str());
  LMKAN_EXPECT(std::strpbrk(message, "\r\n") == nullptr, "\"%s\" has lines", message);
  LMKAN_EXPECT(emulation::num_launches == launches, "%s: launched", word.c_str());
  LMKAN_EXPECT(emulation::last_error == cudaSuccess, "%s: leaves an error", word.c_str());
  LMKAN_EXPECT(call.Run(nullptr, 0) == expected, "%s without a message", word.c_str());
  char small[8];
  std::memset(small, 0x55, sizeof small);
  LMKAN_EXPECT(call.Run(small, 4) == expected && small[3] == 0 && small[4] == 0x55,
               "%s with a short message", word.c_str());
}

template <class Change>
void ExpectInvalid(const std::string& word, const Change& change) {
  Call call;
  change(call);
  ExpectFailure(call, LMKAN_INVALID_ARGUMENT, word);
}

void TestArguments() {
  ExpectInvalid("null", [](Call& call) { call.table = nullptr; });
  ExpectInvalid("null", [](Call& call) { call.desc.data = nullptr; });
  ExpectInvalid("null", [](Call& call) { call.x = nullptr; });
  ExpectInvalid("null", [](Call& call) { call.y = nullptr; });
  for (const lmkan_dtype dtype : {-1, 4, 1000}) {
    const std::string number = std::to_string(dtype);
    ExpectInvalid(number, [&](Call& call) { call.desc.dtype = dtype; });
    ExpectInvalid(number, [&](Call& call) { call.dtype = dtype; });
  }
  ExpectInvalid("dtype 3", [](Call& call) { call.dtype = LMKAN_INT8; });
  ExpectInvalid("without scales", [](Call& call) { call.desc.dtype = LMKAN_INT8; });
  ExpectInvalid("with scales", [](Call& call) { call.desc.scales = values; });
  for (const int64_t bad :
       {int64_t{0}, int64_t{-1}, kLeast, kMost, kMost / 100, int64_t{1} << 59}) {
    const std::string number = std::to_string(bad);
    ExpectInvalid(number, [&](Call& call) { call.desc.num_pairs = bad; });
    ExpectInvalid(number, [&](Call& call) { call.desc.num_outputs = bad; });
    ExpectInvalid(number, [&](Call& call) { call.desc.num_grids = bad; });
  }
  ExpectInvalid("2", [](Call& call) { call.desc.num_grids = 2; });
  ExpectInvalid("46340", [](Call& call) { call.desc.num_grids = 46340; });
  for (const int64_t bad : {int64_t{-1}, kLeast, kMost, kMost / 4}) {
    ExpectInvalid(std::to_string(bad), [&](Call& call) { call.rows = bad; });
  }
  for (const lmkan_cuda_tactic tactic : {-1, 5}) {
    ExpectInvalid(std::to_string(tactic), [&](Call& call) { call.tactic = tactic; });
  }
  ExpectInvalid("the table aligned", [](Call& call) { call.desc.data = values + 1; });
  ExpectInvalid("x aligned", [](Call& call) { call.x = values + 1; });
  ExpectInvalid("y aligned", [](Call& call) { call.y = values + 1; });
  ExpectInvalid("the scales aligned", [](Call& call) {
    call.desc.dtype = LMKAN_INT8;
    call.desc.scales = values + 1;
  });
  ExpectInvalid("the workspace aligned", [](Call& call) { call.workspace = values + 1; });
  const auto split = [](Call& call) {  // two parts of two rows of three outputs
    call.tactic = LMKAN_CUDA_SPLIT;
    call.desc.num_pairs = 5;
  };
  ExpectInvalid("48 bytes for tactic SPLIT (4), found 47", [&](Call& call) {
    split(call);
    call.workspace_size = 47;
  });
  ExpectInvalid("48 bytes for tactic SPLIT (4), found 0", [&](Call& call) {
    split(call);
    call.workspace = nullptr;
  });
}

// Without rows nothing is launched, with a device or without.
void TestNoRows() {
  for (const cudaError_t error : {cudaSuccess, cudaErrorInsufficientDriver}) {
    emulation::device.error = error;
    Call call;
    call.rows = 0;
    call.x = call.y = nullptr;
    const int64_t launches = emulation::num_launches;
    LMKAN_EXPECT(call.Run(nullptr, 0) == LMKAN_OK, "no rows");
    LMKAN_EXPECT(emulation::num_launches == launches, "no rows launched");
  }
  emulation::device = {};
}

void TestFailures() {
  emulation::device.error = cudaErrorInsufficientDriver;
  ExpectFailure({}, LMKAN_CUDA_ERROR, "CUDA driver version is insufficient");
  emulation::device = {};
  emulation::device.launch_error = cudaErrorNoKernelImageForDevice;
  for (const lmkan_cuda_tactic tactic :
       {LMKAN_CUDA_GATHER, LMKAN_CUDA_SHARED, LMKAN_CUDA_NARROW, LMKAN_CUDA_SPLIT}) {
    Call call;
    call.tactic = tactic;
    call.desc.num_pairs = 5;
    ExpectFailure(call, LMKAN_CUDA_ERROR, "no kernel image");
  }
  emulation::device = {};
  Call call;
  call.tactic = LMKAN_CUDA_SHARED;
  call.desc.num_grids = 42;
  ExpectFailure(call, LMKAN_UNSUPPORTED,
                "2 pairs, 42 grid cells an axis and 3 outputs, found SHARED (2)");
  call.tactic = LMKAN_CUDA_NARROW;
  ExpectFailure(call, LMKAN_UNSUPPORTED, "found NARROW (3)");
  call.desc.num_grids = 4;
  call.desc.num_outputs = 9;
  ExpectFailure(call, LMKAN_UNSUPPORTED, "9 outputs, found NARROW (3)");
  call.tactic = LMKAN_CUDA_SPLIT;
  call.workspace = nullptr;
  call.desc.num_pairs = 4;
  ExpectFailure(call, LMKAN_UNSUPPORTED,
                "4 pairs, 4 grid cells an axis and 9 outputs, found SPLIT (4)");
}

void TestTactics() {
  const auto tactics = [](int64_t num_grids, lmkan_dtype dtype = LMKAN_FLOAT32,
                          int64_t num_outputs = 9, int64_t num_pairs = 2) {
    lmkan_table_desc desc = {nullptr, LMKAN_FLOAT32, num_pairs, num_grids, num_outputs, nullptr};
    lmkan_cuda_tactic found[5] = {-1, -1, -1, -1, -1};
    const int32_t count = lmkan_cuda_tactics(&desc, dtype, found, 5);
    std::string text = std::to_string(count);
    for (int32_t i = 0; i < std::max(count, 3); ++i) text += " " + std::to_string(found[i]);
    LMKAN_EXPECT(lmkan_cuda_tactics(&desc, dtype, nullptr, 0) == count, "without a place");
    lmkan_cuda_tactic one[2] = {-1, -1};
    LMKAN_EXPECT(lmkan_cuda_tactics(&desc, dtype, one, 1) == count && one[1] == -1, "one place");
    return text;
  };
  LMKAN_EXPECT(tactics(26) == "2 2 1 -1", "G 26: %s", tactics(26).c_str());
  LMKAN_EXPECT(tactics(41) == "2 2 1 -1", "G 41: %s", tactics(41).c_str());
  LMKAN_EXPECT(tactics(42) == "1 1 -1 -1", "G 42: %s", tactics(42).c_str());
  LMKAN_EXPECT(tactics(46339) == "1 1 -1 -1", "G 46339: %s", tactics(46339).c_str());
  for (const auto& [num_outputs, most_grids] : {std::pair{1, 41}, {2, 29}, {4, 20}}) {
    const std::string within = tactics(most_grids, LMKAN_FLOAT32, num_outputs);
    const std::string beyond = tactics(most_grids + 1, LMKAN_FLOAT32, num_outputs);
    LMKAN_EXPECT(within == "3 3 2 1", "G %d: %s", most_grids, within.c_str());
    LMKAN_EXPECT(beyond[0] < '3', "G %d: %s", most_grids + 1, beyond.c_str());
  }
  const std::string all = tactics(5, LMKAN_FLOAT32, 4, 5);
  LMKAN_EXPECT(all == "4 3 2 4 1", "%s", all.c_str());
  LMKAN_EXPECT(tactics(2)[0] == '0' && tactics(26, LMKAN_INT8)[0] == '0', "an invalid table");
  LMKAN_EXPECT(lmkan_cuda_tactics(nullptr, LMKAN_FLOAT32, nullptr, 0) == 0, "no table");
  emulation::device.error = cudaErrorInsufficientDriver;
  LMKAN_EXPECT(tactics(26)[0] == '0', "without a device");
  emulation::device = {};
  emulation::device.launch_error = cudaErrorNoKernelImageForDevice;
  LMKAN_EXPECT(tactics(26)[0] == '0', "a device that the kernels are not made for");
  emulation::device = {};
  LMKAN_EXPECT(emulation::last_error == cudaSuccess, "leaves an error");
}

void TestWorkspace() {
  const lmkan_table_desc desc = {nullptr, LMKAN_INT8, 2, 4, 3, nullptr};
  char message[256] = "";
  for (const lmkan_cuda_tactic tactic :
       {LMKAN_CUDA_AUTO, LMKAN_CUDA_GATHER, LMKAN_CUDA_SHARED, LMKAN_CUDA_NARROW}) {
    size_t bytes = 1;
    LMKAN_EXPECT(lmkan_cuda_workspace_size(&desc, LMKAN_FLOAT16, 1000, tactic, &bytes, message,
                                           sizeof message) == LMKAN_OK &&
                     bytes == 0,
                 "%zu bytes, %s", bytes, message);
  }
  // SPLIT: of 129 pairs 17 parts of 8, up to a limit.
  const lmkan_table_desc many = {nullptr, LMKAN_INT8, 129, 4, 100, nullptr};
  const size_t row_bytes = 17 * 100 * sizeof(float);
  const std::pair<int64_t, size_t> sizes[] = {
      {0, 0},
      {1, row_bytes},
      {7, 7 * row_bytes},
      {kMost >> 20, (32 << 20) / row_bytes / 256 * 256 * row_bytes}};
  for (const auto& [rows, expected] : sizes) {
    size_t bytes = 1;
    LMKAN_EXPECT(lmkan_cuda_workspace_size(&many, LMKAN_FLOAT16, rows, LMKAN_CUDA_SPLIT, &bytes,
                                           message, sizeof message) == LMKAN_OK &&
                     bytes == expected,
                 "%lld rows: %zu bytes, not %zu", static_cast<long long>(rows), bytes, expected);
  }
  const lmkan_table_desc wide = {nullptr, LMKAN_INT8, 129, 4, int64_t{1} << 30, nullptr};
  size_t bytes = 1;
  LMKAN_EXPECT(lmkan_cuda_workspace_size(&wide, LMKAN_FLOAT16, 9, LMKAN_CUDA_SPLIT, &bytes, message,
                                         sizeof message) == LMKAN_OK &&
                   bytes == size_t{17} << 32,
               "a row that is larger than the limit: %zu bytes", bytes);
  bytes = 1;
  LMKAN_EXPECT(lmkan_cuda_workspace_size(&desc, LMKAN_FLOAT16, -1, 0, &bytes, message,
                                         sizeof message) == LMKAN_INVALID_ARGUMENT &&
                   bytes == 1,
               "negative rows");
  LMKAN_EXPECT(lmkan_cuda_workspace_size(&desc, LMKAN_FLOAT16, 1, 0, nullptr, message,
                                         sizeof message) == LMKAN_INVALID_ARGUMENT,
               "no place");
}

// Plans stay within what the kernels and devices allow, whatever the problem.
void TestPlans() {
  using cuda::Device;
  using cuda::Problem;
  for (const int32_t processors : {1, 7, 132, 100000}) {
    const Device device = {processors, 227 << 10, true};
    for (const lmkan_dtype dtype : kTableDtypes) {
      for (const int64_t pairs : {int64_t{1}, int64_t{5}, int64_t{300}, int64_t{1} << 33}) {
        for (const int64_t outputs : {int64_t{1}, int64_t{40}, int64_t{1} << 20}) {
          for (const int64_t rows : {int64_t{1}, int64_t{33}, int64_t{5000}, int64_t{1} << 40}) {
            const Problem problem = {dtype, rows, pairs, outputs, 26};
            const cuda::GatherPlan gather = cuda::PlanGather(problem, device);
            LMKAN_EXPECT(gather.threads() >= 1 && gather.threads() <= cuda::kGatherMostThreads &&
                             gather.rows * gather.pairs <= cuda::kGatherMostPlaces &&
                             gather.pairs % gather.splits == 0 && gather.pairs > 0 &&
                             gather.shared_bytes <= 48 << 10,
                         "%d threads, %d rows, %d pairs, %d splits, %d bytes", gather.threads(),
                         gather.rows, gather.pairs, gather.splits, gather.shared_bytes);
            const cuda::NarrowPlan narrow = cuda::PlanNarrow(problem, device);
            LMKAN_EXPECT(
                (narrow.warp_rows == 0) == (outputs > cuda::kNarrowMostOutputs) &&
                    narrow.pairs % 32 == 0 && narrow.shared_bytes <= device.shared_per_block &&
                    narrow.blocks <= narrow.num_items,
                "%d rows, %d pairs, %d bytes", narrow.warp_rows, narrow.pairs, narrow.shared_bytes);
            const cuda::SharedPlan shared = cuda::PlanShared(problem, device);
            const cuda::SplitPlan split = cuda::PlanSplit(problem, device);
            if (pairs > INT32_MAX) {
              LMKAN_EXPECT(shared.threads == 0 && split.shared.threads == 0,
                           "more pairs than the kernels count");
              continue;
            }
            LMKAN_EXPECT(shared.threads >= 128 && shared.threads <= cuda::kSharedMostThreads &&
                             shared.stages == 2 && shared.shared_bytes <= device.shared_per_block,
                         "%d threads, %d stages, %d bytes", shared.threads, shared.stages,
                         shared.shared_bytes);
            if (pairs == 1) {
              LMKAN_EXPECT(split.shared.threads == 0, "one pair in parts");
              continue;
            }
            LMKAN_EXPECT(split.num_parts >= 2 && split.num_parts <= 32 &&
                             split.part_pairs % 4 == 0 &&
                             (split.num_parts - 1) * split.part_pairs < pairs &&
                             split.num_parts * split.part_pairs >= pairs && split.turn_rows >= 1 &&
                             split.turn_rows <= rows,
                         "%d parts of %d pairs, %d rows", split.num_parts, split.part_pairs,
                         static_cast<int>(split.turn_rows));
          }
        }
      }
    }
  }
  const Device h200 = {132, 227 << 10, true};
  const Problem one_row = {LMKAN_FLOAT32, 1, 64, 128, 26};
  const Problem many_rows = {LMKAN_FLOAT32, 1 << 20, 256, 512, 26};
  LMKAN_EXPECT(!cuda::PrefersShared(one_row, h200), "one row");
  LMKAN_EXPECT(cuda::PrefersShared(many_rows, h200), "a million rows");
  LMKAN_EXPECT(cuda::PlanGather({LMKAN_FLOAT32, 1, 256, 512, 26}, h200).num_items == 64, "one row");
}

// SPLIT's rows in turns have the bits that they have at once.
void TestTurns() {
  for (const lmkan_dtype x_dtype : kXDtypes) {
    const Shape shape = {12, 4, 6, 1300};
    const Table table = MakeTable(shape, LMKAN_FLOAT16, 1);
    const Array x = MakeX(shape, x_dtype, 2);
    cuda::Lookup lookup = {};
    lookup.table = table.entries.data();
    lookup.x = x.data();
    lookup.rows = shape.rows;
    lookup.num_pairs = shape.num_pairs;
    lookup.num_outputs = shape.num_outputs;
    lookup.num_grids = static_cast<int32_t>(shape.num_grids);
    lookup.table_dtype = LMKAN_FLOAT16;
    lookup.x_dtype = x_dtype;
    for (int32_t i = 0; i < lookup.num_grids; ++i) {
      lookup.cells[i] = cuda::MakeGridCell(lookup.num_grids, i);
    }
    const cuda::Problem problem = {LMKAN_FLOAT16, shape.rows, shape.num_pairs, shape.num_outputs,
                                   lookup.num_grids};
    cuda::SplitPlan plan = cuda::PlanSplit(problem, {2, 227 << 10, false});
    LMKAN_EXPECT(plan.num_parts == 3 && plan.turn_rows == shape.rows, "%d parts", plan.num_parts);
    std::vector<float> workspace(static_cast<size_t>(plan.num_parts * shape.y_size()));
    Array at_once(x_dtype, shape.y_size());
    Array in_turns(x_dtype, shape.y_size());
    in_turns.Fill(0xff);
    for (Array* y : {&at_once, &in_turns}) {
      lookup.y = y->data();
      const int64_t launches = emulation::num_launches;
      LMKAN_EXPECT(
          cuda::LaunchSplit(lookup, plan, workspace.data(), 227 << 10, nullptr) == cudaSuccess,
          "not launched");
      LMKAN_EXPECT(emulation::num_launches - launches == (y == &at_once ? 2 : 6), "launches");
      plan.turn_rows = 600;  // more than a block has, and 100 in the end
    }
    ExpectClose(shape, Evaluate(shape, x.ToDoubles(), table.ToDoubles()), at_once, "at once");
    LMKAN_EXPECT(std::memcmp(at_once.data(), in_turns.data(), at_once.num_bytes()) == 0,
                 "turns differ");
  }
}

// Indices beyond 32 bits: the functions that the kernels use, and a table of 6 GB, of which only
// some pages exist.
void TestOffsets() {
  const int64_t big = int64_t{1} << 31;
  LMKAN_EXPECT(cuda::CornerOffset(big, 5, 4, 3) == (big * 16 + 5) * 3, "pairs");
  LMKAN_EXPECT(cuda::CornerOffset(1, 46339 * 46340 + 46339, 46340, big) ==
                   (int64_t{46340} * 46340 + int64_t{46339} * 46340 + 46339) * big,
               "cells and outputs");
  LMKAN_EXPECT(cuda::FeaturesOffset(big, 7, 10) == 2 * (big * 10 + 7), "rows");

  const Shape shape = {2, 25, int64_t{1} << 20, 1};
  const auto bytes = static_cast<size_t>(shape.table_size()) * sizeof(float);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (!LMKAN_EXPECT(memory != MAP_FAILED, "no address space")) return;
  float* const table = static_cast<float*>(memory);
  Array x(LMKAN_FLOAT32, 4);
  // The second pair lies on the very last point of the grid.
  x.Set(2, GridPoint(25, 25));
  x.Set(3, GridPoint(25, 25));
  table[shape.table_size() - 1] = 3;
  table[shape.table_size() - shape.num_outputs + 5] = 2;
  Array y(LMKAN_FLOAT32, shape.num_outputs);
  y.Fill(0xff);
  const lmkan_table_desc desc = {table, LMKAN_FLOAT32, 2, 25, shape.num_outputs, nullptr};
  char message[256] = "";
  const lmkan_status status =
      lmkan_cuda_lookup2d(&desc, LMKAN_FLOAT32, x.data(), y.data(), 1, LMKAN_CUDA_GATHER, nullptr,
                          0, nullptr, message, sizeof message);
  LMKAN_EXPECT(status == LMKAN_OK, "%s", message);
  int64_t others = 0;
  for (int64_t o = 0; o < shape.num_outputs; ++o) {
    if (o != 5 && o != shape.num_outputs - 1 && y.Get(o) != 0) ++others;
  }
  LMKAN_EXPECT(others == 0 && std::fabs(y.Get(5) - 2) < 1e-5 &&
                   std::fabs(y.Get(shape.num_outputs - 1) - 3) < 1e-5,
               "%d others, %g, %g", static_cast<int>(others), y.Get(5),
               y.Get(shape.num_outputs - 1));
  munmap(memory, bytes);
}

}  // namespace
}  // namespace lmkan::test

int main() {
  using namespace lmkan::test;
  TestArguments();
  TestNoRows();
  TestFailures();
  TestTactics();
  TestWorkspace();
  TestPlans();
  TestTurns();
  TestOffsets();
  return Finish();
}
