// Drives a lookup: checks the call, splits the work, and runs the three steps of each chunk.
#include "lmkan/lookup2d.h"

#include <algorithm>
#include <cstdint>

#include "kernel.h"
#include "status.h"
#include "table.h"

namespace lmkan::cpu {
namespace {

// Rows that share one pass over the table. More rows read the table less often; fewer keep records
// and sums nearer to the core.
constexpr int64_t kMostChunkRows = 1024;
constexpr int64_t kMostRecordBytes = int64_t{8} << 20;

// Evaluations (one row, pair and output) below which a task costs more than it gains.
constexpr int64_t kTaskEvaluations = 64 * 1024;

struct Range {
  int64_t begin;
  int64_t end;
};

// Part `index` of `parts` nearly equal parts of 0 ... size - 1.
Range Part(int64_t size, int64_t index, int64_t parts) {
  const int64_t quotient = size / parts;
  const int64_t remainder = size % parts;
  const int64_t begin = index * quotient + std::min(index, remainder);
  return {begin, begin + quotient + (index < remainder ? 1 : 0)};
}

int64_t NumGroups(const lmkan_cpu_table& table) {
  return (table.num_pairs + kGroupPairs - 1) / kGroupPairs;
}

int64_t ChunkRows(const lmkan_cpu_table& table) {
  const int64_t bytes = NumGroups(table) * static_cast<int64_t>(sizeof(CellRecord));
  return std::clamp<int64_t>(kMostRecordBytes / bytes, 8, kMostChunkRows);
}

int64_t DtypeSize(lmkan_dtype dtype) { return dtype == LMKAN_FLOAT32 ? 4 : 2; }

// The rows and blocks of one task, with memory for its intermediate results.
lmkan_status RunTask(const lmkan_cpu_table& table, lmkan_dtype dtype, const char* x, char* y,
                     Range rows, Range blocks, const Message& message) {
  const int64_t chunk_rows = std::min(ChunkRows(table), rows.end - rows.begin);
  const int64_t groups = NumGroups(table);
  const size_t record_bytes = static_cast<size_t>(groups * chunk_rows) * sizeof(CellRecord);
  const size_t sum_bytes = static_cast<size_t>(chunk_rows) * kMaxBlockOutputs * sizeof(float);
  const Buffer<char> scratch(
      static_cast<char*>(std::aligned_alloc(64, (record_bytes + sum_bytes + 63) / 64 * 64)));
  if (scratch == nullptr) {
    return Fail(LMKAN_OUT_OF_MEMORY, message, "no memory for %zu bytes of intermediate results",
                record_bytes + sum_bytes);
  }
  auto* records = reinterpret_cast<CellRecord*>(scratch.get());
  auto* sums = reinterpret_cast<float*>(scratch.get() + record_bytes);

  const KernelSet& kernels = *table.kernels;
  const int64_t num_features = 2 * table.num_pairs;
  const int64_t table_element = DtypeSize(table.dtype);
  for (int64_t first = rows.begin; first < rows.end; first += chunk_rows) {
    const int64_t count = std::min(chunk_rows, rows.end - first);
    FindCellsArgs find;
    find.x = x + first * num_features * DtypeSize(dtype);
    find.rows = count;
    find.num_features = num_features;
    find.grid = table.grid();
    find.records = records;
    kernels.find_cells[dtype](find);

    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      const Block block = table.block(b);
      AccumulateArgs accumulate;
      accumulate.slices = static_cast<const char*>(table.data) + block.offset * table_element;
      accumulate.pair_stride = block.pair_stride;
      accumulate.cell_stride = block.cell_stride;
      accumulate.line_stride = (table.num_grids + 1) * block.cell_stride;
      accumulate.num_pairs = table.num_pairs;
      accumulate.records = records;
      accumulate.rows = count;
      accumulate.width = block.width;
      accumulate.sums = sums;
      kernels.accumulate[table.dtype](accumulate);

      StoreArgs store;
      store.sums = sums;
      store.rows = count;
      store.width = block.width;
      store.y = y + (first * table.num_outputs + block.first_output) * DtypeSize(dtype);
      store.y_stride = table.num_outputs;
      store.outputs = block.outputs;
      kernels.store[dtype](store);
    }
  }
  return LMKAN_OK;
}

}  // namespace
}  // namespace lmkan::cpu

int32_t lmkan_abi_version(void) { return LMKAN_ABI_VERSION; }

const char* lmkan_version(void) { return LMKAN_VERSION; }

int64_t lmkan_cpu_num_tasks(const lmkan_cpu_table* table, int64_t rows, int32_t num_threads) {
  using namespace lmkan::cpu;
  if (table == nullptr || rows < 1 || num_threads < 2) return 1;
  const int64_t evaluations_a_row = table->num_pairs * table->num_outputs;
  const int64_t worth = std::max<int64_t>(1, rows > INT64_MAX / evaluations_a_row
                                                 ? INT64_MAX / kTaskEvaluations
                                                 : rows * evaluations_a_row / kTaskEvaluations);
  // Whole chunks where there are enough of them; otherwise an equal share for each thread.
  const int64_t chunks = (rows + ChunkRows(*table) - 1) / ChunkRows(*table);
  const int64_t wanted = chunks >= 4 * num_threads ? chunks : num_threads;
  return std::min(worth, wanted);
}

lmkan_status lmkan_cpu_lookup2d(const lmkan_cpu_table* table, lmkan_dtype dtype, const void* x,
                                void* y, int64_t rows, int64_t task, int64_t num_tasks,
                                char* message, size_t message_size) {
  using namespace lmkan::cpu;
  const Message out{message, message_size};
  if (table == nullptr) {
    return Fail(LMKAN_INVALID_ARGUMENT, out, "expected a table handle, found a null pointer");
  }
  if (dtype < LMKAN_FLOAT32 || dtype > LMKAN_BFLOAT16) {
    return Fail(LMKAN_INVALID_ARGUMENT, out,
                "expected x of float32 (0), float16 (1) or bfloat16 (2), found dtype %d",
                static_cast<int>(dtype));
  }
  if (rows < 0 || num_tasks < 1 || task < 0 || task >= num_tasks) {
    return Fail(LMKAN_INVALID_ARGUMENT, out,
                "expected rows >= 0 and 0 <= task < num_tasks, found rows %lld, task %lld of %lld",
                static_cast<long long>(rows), static_cast<long long>(task),
                static_cast<long long>(num_tasks));
  }
  if (rows == 0) return LMKAN_OK;
  if (x == nullptr || y == nullptr) {
    return Fail(LMKAN_INVALID_ARGUMENT, out, "expected memory for x and y, found a null pointer");
  }
  // Rows first; the outputs are split too where there are fewer rows than tasks.
  const int64_t row_parts = std::min(num_tasks, rows);
  const int64_t block_parts = std::min(table->num_blocks, num_tasks / row_parts);
  if (task >= row_parts * block_parts) return LMKAN_OK;
  return RunTask(*table, dtype, static_cast<const char*>(x), static_cast<char*>(y),
                 Part(rows, task % row_parts, row_parts),
                 Part(table->num_blocks, task / row_parts, block_parts), out);
}
