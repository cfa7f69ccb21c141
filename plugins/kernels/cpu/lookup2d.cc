// Drives a lookup: checks the call, splits the work, and runs the three steps of each chunk.
#include "lmkan/lookup2d.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "kernel.h"
#include "status.h"
#include "table.h"

namespace lmkan::cpu {
namespace {

// Below this many rows the sums stay in registers over all pairs; from it on, the pairs of a group
// stay in the cache over all rows.
constexpr int64_t kFewRows = 4;

// A table of fewer bytes stays in the second-level cache from call to call.
constexpr int64_t kCachedTable = int64_t{1} << 20;

// Entries of a table above which a row reads its blocks one after the other.
constexpr int64_t kSpreadTable = int64_t{8} << 20;

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

int64_t PairsOf(const lmkan_cpu_table& table, int64_t group) {
  return std::min<int64_t>(kGroupPairs, table.num_pairs - group * kGroupPairs);
}

// Of nearly equal chunks: a few rows more are less than a chunk of few rows, which reads as much of
// the table.
int64_t NumChunks(const lmkan_cpu_table& table, int64_t rows) {
  const bool round_up = rows % table.chunk_rows >= table.chunk_rows / 2;
  return std::max<int64_t>(1, rows / table.chunk_rows + (round_up ? 1 : 0));
}

int64_t DtypeSize(lmkan_dtype dtype) { return dtype == LMKAN_FLOAT32 ? 4 : 2; }

int64_t RoundUpToCacheLine(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Memory for the intermediate results of a chunk: on the stack for a few rows, because an
// allocation would take a good part of their time.
class Scratch {
 public:
  // False when there is no memory.
  bool Allocate(int64_t groups, int64_t rows) {
    const int64_t record_bytes = RoundUpToCacheLine(groups * rows * int64_t{sizeof(CellRecord)});
    const int64_t sums = std::max<int64_t>(rows * kCompactBlockOutputs, kMaxRowOutputs);
    const int64_t sum_bytes = RoundUpToCacheLine(sums * int64_t{sizeof(float)});
    char* memory = stack_;
    if (record_bytes + sum_bytes > static_cast<int64_t>(sizeof stack_)) {
      heap_.reset(static_cast<char*>(
          std::aligned_alloc(64, static_cast<size_t>(record_bytes + sum_bytes))));
      memory = heap_.get();
    }
    records_ = reinterpret_cast<CellRecord*>(memory);
    sums_ = reinterpret_cast<float*>(memory + record_bytes);
    return memory != nullptr;
  }
  CellRecord* records() const { return records_; }
  float* sums() const { return sums_; }

 private:
  alignas(64) char stack_[16 << 10];
  Buffer<char> heap_;
  CellRecord* records_ = nullptr;
  float* sums_ = nullptr;
};

// One group of pairs of one block.
struct Slice {
  const char* data;
  const float* scales;  // of INT8 tables; otherwise null
  int64_t pairs;
  int64_t bytes;
};

Slice SliceOf(const lmkan_cpu_table& table, const Block& block, int64_t group) {
  const int64_t first_pair = group * kGroupPairs;
  const int64_t element = table.element_size();
  const int64_t pairs = PairsOf(table, group);
  const char* data = static_cast<const char*>(table.data) +
                     (block.offset + first_pair * block.strides.pair) * element;
  const float* scales = table.scales == nullptr
                            ? nullptr
                            : table.scales.get() + block.scales + first_pair * block.width;
  return {data, scales, pairs, pairs * block.strides.pair * element};
}

void FindCells(const lmkan_cpu_table& table, lmkan_dtype dtype, const char* x, int64_t rows,
               CellRecord* records) {
  FindCellsArgs args;
  args.x = x;
  args.rows = rows;
  args.num_features = 2 * table.num_pairs;
  args.grid = table.grid();
  args.records = records;
  table.kernels->find_cells[dtype](args);
  if (table.dtype != LMKAN_INT8) return;
  for (int64_t g = 0; g < NumGroups(table); ++g) {
    table.kernels->round_weights({records + g * rows, rows, PairsOf(table, g)});
  }
}

// `count` blocks from the first on as one. They are equally wide.
Block Together(const lmkan_cpu_table& table, const Block& first, int64_t count) {
  Block block = first;
  block.width *= count;
  block.outputs = std::min(block.width, table.num_outputs - first.first_output);
  return block;
}

// How many blocks from b on, before `end`, the rows take at once. Several share the work on
// weights, but spread over memory: more than one row, or a table that caches can't hold, loses more
// by that.
int64_t BlocksAtOnce(const lmkan_cpu_table& table, int64_t b, int64_t end, int64_t rows) {
  if (rows != 1 || table.num_blocks * table.block(0).strides.block > kSpreadTable) return 1;
  const int64_t width = table.block(b).width;
  const int64_t most = std::min(
      end - b, std::max<int64_t>(1, table.kernels->row_outputs[table.kernel_index()] / width));
  return table.block(b + most - 1).width == width ? most : std::max<int64_t>(1, most - 1);
}

// Where the sums of a block go: to y where that is float32 and takes whole vectors, otherwise to
// the scratch memory, from which Store takes them.
struct Sums {
  float* data;
  int64_t stride;
  bool in_scratch;
};

Sums SumsOf(const lmkan_cpu_table& table, lmkan_dtype dtype, const Block& block,
            const Scratch& scratch, char* y) {
  if (dtype != LMKAN_FLOAT32 || block.outputs != block.width) {
    return {scratch.sums(), block.width, true};
  }
  return {reinterpret_cast<float*>(y) + block.first_output, table.num_outputs, false};
}

// Neighbouring blocks row by row.
void AccumulateFewRows(const lmkan_cpu_table& table, const Block& block, int64_t num_blocks,
                       int64_t rows, const Scratch& scratch, const Sums& sums) {
  AccumulateRowArgs args;
  const Slice slice = SliceOf(table, block, 0);
  args.slices = slice.data;
  args.strides = block.strides;
  args.scales = slice.scales;
  args.num_pairs = table.num_pairs;
  args.record_stride = rows;
  args.num_blocks = num_blocks;
  args.width = block.width;
  for (int64_t r = 0; r < rows; ++r) {
    args.records = scratch.records() + r;
    args.sums = sums.data + r * sums.stride;
    table.kernels->accumulate_row[table.kernel_index()](args);
  }
}

// What a pass fetches for the next one: all of its slice where the rows need most of it, their
// corners where they don't, and nothing of a table that is in the cache anyway or too scattered.
void FetchNext(const lmkan_cpu_table& table, const Block& block, int64_t group,
               const Scratch& scratch, AccumulateArgs* args) {
  const Slice slice = SliceOf(table, block, group);
  const bool whole = args->rows >= table.whole_slice_rows;
  const int64_t table_bytes = slice.bytes * NumGroups(table) * table.num_blocks;
  if (!table.packed || (!whole && table_bytes < kCachedTable)) return;
  args->next_slices = slice.data;
  args->next_strides = block.strides;
  args->next_bytes = slice.bytes;
  args->next_records = whole ? nullptr : scratch.records() + group * args->rows;
  args->next_pairs = slice.pairs;
}

// A block group by group. After the last group comes the first of `next_block`, if there is one.
void AccumulateManyRows(const lmkan_cpu_table& table, const Block& block, const Block* next_block,
                        int64_t rows, const Scratch& scratch, const Sums& sums) {
  const int64_t groups = NumGroups(table);
  for (int64_t g = 0; g < groups; ++g) {
    const Slice slice = SliceOf(table, block, g);
    AccumulateArgs args = {};
    args.slices = slice.data;
    args.strides = block.strides;
    args.scales = slice.scales;
    args.num_pairs = slice.pairs;
    args.records = scratch.records() + g * rows;
    args.rows = rows;
    args.width = block.width;
    args.sums = scratch.sums();
    args.is_first = g == 0;
    args.out = g + 1 < groups ? scratch.sums() : sums.data;
    args.out_stride = g + 1 < groups ? block.width : sums.stride;
    if (g + 1 < groups) {
      FetchNext(table, block, g + 1, scratch, &args);
    } else if (next_block != nullptr) {
      FetchNext(table, *next_block, 0, scratch, &args);
    }
    table.kernels->accumulate[table.kernel_index()](args);
  }
}

void Store(const lmkan_cpu_table& table, lmkan_dtype dtype, const Block& block, int64_t rows,
           const Scratch& scratch, char* y) {
  StoreArgs args;
  args.sums = scratch.sums();
  args.rows = rows;
  args.width = block.width;
  args.y = y + block.first_output * DtypeSize(dtype);
  args.y_stride = table.num_outputs;
  args.outputs = block.outputs;
  table.kernels->store[dtype](args);
}

// The rows and blocks of one task.
lmkan_status RunTask(const lmkan_cpu_table& table, lmkan_dtype dtype, const char* x, char* y,
                     Range rows, Range blocks, const Message& message) {
  const int64_t num_rows = rows.end - rows.begin;
  const int64_t num_chunks = NumChunks(table, num_rows);
  const int64_t most_rows = (num_rows + num_chunks - 1) / num_chunks;
  Scratch scratch;
  if (!scratch.Allocate(NumGroups(table), most_rows)) {
    return Fail(LMKAN_OUT_OF_MEMORY, message, "no memory for the intermediate results of %lld rows",
                static_cast<long long>(most_rows));
  }
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    const Range part = Part(num_rows, chunk, num_chunks);
    const int64_t first = rows.begin + part.begin;
    const int64_t count = part.end - part.begin;
    const bool is_last_chunk = chunk + 1 == num_chunks;
    FindCells(table, dtype, x + first * 2 * table.num_pairs * DtypeSize(dtype), count,
              scratch.records());
    char* const chunk_y = y + first * table.num_outputs * DtypeSize(dtype);
    int64_t num_blocks;
    for (int64_t b = blocks.begin; b < blocks.end; b += num_blocks) {
      num_blocks = BlocksAtOnce(table, b, blocks.end, count);
      const Block block = Together(table, table.block(b), num_blocks);
      const Sums sums = SumsOf(table, dtype, block, scratch, chunk_y);
      if (count < kFewRows) {
        AccumulateFewRows(table, table.block(b), num_blocks, count, scratch, sums);
      } else {
        const bool is_last_block = b + 1 == blocks.end;
        const Block next = table.block(is_last_block ? blocks.begin : b + 1);
        // Which corners the next chunk reads is not known yet.
        const bool is_known = !is_last_block || (!is_last_chunk && count >= table.whole_slice_rows);
        AccumulateManyRows(table, block, is_known ? &next : nullptr, count, scratch, sums);
      }
      if (sums.in_scratch) Store(table, dtype, block, count, scratch, chunk_y);
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
  const int64_t chunks = NumChunks(*table, rows);
  const int64_t wanted = chunks >= int64_t{4} * num_threads ? chunks : num_threads;
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
                "expected x of float32 (0), float16 (1) or bfloat16 (2), found dtype %d", dtype);
  }
  if (rows < 0 || num_tasks < 1 || task < 0 || task >= num_tasks) {
    return Fail(LMKAN_INVALID_ARGUMENT, out,
                "expected rows >= 0 and 0 <= task < num_tasks, found rows %lld, task %lld of %lld",
                static_cast<long long>(rows), static_cast<long long>(task),
                static_cast<long long>(num_tasks));
  }
  if (rows == 0) return LMKAN_OK;
  int64_t x_bytes, y_bytes;
  if (__builtin_mul_overflow(rows, 2 * table->num_pairs * DtypeSize(dtype), &x_bytes) ||
      __builtin_mul_overflow(rows, table->num_outputs * DtypeSize(dtype), &y_bytes)) {
    return Fail(LMKAN_INVALID_ARGUMENT, out,
                "expected x and y of less than 2^63 bytes, found %lld rows",
                static_cast<long long>(rows));
  }
  if (x == nullptr || y == nullptr) {
    return Fail(LMKAN_INVALID_ARGUMENT, out, "expected memory for x and y, found a null pointer");
  }
  // Rows first, because each part of the outputs finds the cells anew; but a part with few rows
  // would fetch whole slices for a few corners of each.
  const int64_t worthwhile = std::clamp<int64_t>(rows / table->num_cells(), 1, num_tasks);
  const int64_t block_parts = std::min(table->num_blocks, num_tasks / worthwhile);
  const int64_t row_parts = std::min(rows, num_tasks / block_parts);
  if (task >= row_parts * block_parts) return LMKAN_OK;
  return RunTask(*table, dtype, static_cast<const char*>(x), static_cast<char*>(y),
                 Part(rows, task % row_parts, row_parts),
                 Part(table->num_blocks, task / row_parts, block_parts), out);
}
