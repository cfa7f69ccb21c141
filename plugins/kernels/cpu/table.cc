// Checks a table description and lays the table out for the kernels.
#include "table.h"

#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "status.h"
#include "tuning.h"

using lmkan::cpu::AllocateAligned;
using lmkan::cpu::Block;
using lmkan::cpu::Fail;
using lmkan::cpu::KernelSet;
using lmkan::cpu::Message;

namespace lmkan::cpu {

void* AllocateAligned(size_t bytes) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t alignment = bytes >= 2 * kHugePage ? kHugePage : 64;
  if (bytes > std::numeric_limits<size_t>::max() - alignment) return nullptr;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  if (memory == nullptr) return nullptr;
#if defined(__linux__)
  if (alignment == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
  std::memset(memory, 0, rounded);
  return memory;
}

namespace {

// Bytes of an element of the caller's table.
size_t ElementSize(lmkan_dtype dtype) {
  return dtype == LMKAN_FLOAT32 ? 4 : dtype == LMKAN_INT8 ? 1 : 2;
}

#if defined(LMKAN_HAVE_AVX2_KERNELS)
bool HasAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
#endif

#if defined(LMKAN_HAVE_AVX512_KERNELS)
bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

// The kernels for a request, null when the processor or the build lacks them.
const KernelSet* SelectKernels(lmkan_isa isa) {
#if defined(LMKAN_HAVE_AVX512_KERNELS)
  if ((isa == LMKAN_ISA_AVX512 || isa == LMKAN_ISA_AUTO) && HasAvx512()) return &kAvx512Kernels;
#endif
#if defined(LMKAN_HAVE_AVX2_KERNELS)
  if ((isa == LMKAN_ISA_AVX2 || isa == LMKAN_ISA_AUTO) && HasAvx2()) return &kAvx2Kernels;
#endif
  return isa == LMKAN_ISA_PORTABLE || isa == LMKAN_ISA_AUTO ? &kPortableKernels : nullptr;
}

// σ⁻¹(level) for the grid's σ(x) = ½·e^x (x ≤ 0), 1 − ½·e^−x (x > 0).
double InverseSigma(double level) {
  return level <= 0.5 ? std::log(2.0 * level) : -std::log(2.0 * (1.0 - level));
}

// Points and inverse cell widths in float32, rounded once from float64.
void FillGrid(int64_t num_grids, GridCell* cells) {
  const auto inner = [num_grids](int64_t i) {
    return InverseSigma(static_cast<double>(i) / static_cast<double>(num_grids));
  };
  const auto point = [&](int64_t i) {
    if (i == 0) return 2.0 * inner(1) - inner(2);
    if (i == num_grids) return 2.0 * inner(num_grids - 1) - inner(num_grids - 2);
    return inner(i);
  };
  for (int64_t i = 0; i < num_grids; ++i) {
    cells[i].point = static_cast<float>(point(i));
    cells[i].inverse_width = static_cast<float>(1.0 / (point(i + 1) - point(i)));
  }
}

// An upper bound of the bytes of a table with its outputs rounded up to blocks, or 0 when it does
// not fit 62 bits. Where it does, no size or offset computed later can overflow.
size_t TableBytes(const lmkan_table_desc& desc) {
  int64_t bytes = 2 * static_cast<int64_t>(sizeof(float));
  int64_t outputs;
  if (__builtin_add_overflow(desc.num_outputs, int64_t{kMaxBlockOutputs}, &outputs)) return 0;
  for (const int64_t factor : {desc.num_pairs, desc.num_grids + 1, desc.num_grids + 1, outputs}) {
    if (__builtin_mul_overflow(bytes, factor, &bytes)) return 0;
  }
  return static_cast<size_t>(bytes);
}

lmkan_status CheckDesc(const lmkan_table_desc* desc, const Message& message) {
  if (desc == nullptr || desc->data == nullptr) {
    return Fail(LMKAN_INVALID_ARGUMENT, message, "expected a table, found a null pointer");
  }
  if (desc->dtype < LMKAN_FLOAT32 || desc->dtype > LMKAN_INT8) {
    return Fail(LMKAN_INVALID_ARGUMENT, message,
                "expected a table of float32 (0), float16 (1), bfloat16 (2) or int8 (3), found "
                "dtype %d",
                desc->dtype);
  }
  if ((desc->dtype == LMKAN_INT8) != (desc->scales != nullptr)) {
    return Fail(LMKAN_INVALID_ARGUMENT, message,
                "expected scales for a table of int8 and for no other, found dtype %d %s scales",
                desc->dtype, desc->scales == nullptr ? "without" : "with");
  }
  if (desc->num_pairs < 1 || desc->num_outputs < 1) {
    return Fail(LMKAN_INVALID_ARGUMENT, message,
                "expected at least 1 pair and 1 output, found %lld pairs and %lld outputs",
                static_cast<long long>(desc->num_pairs), static_cast<long long>(desc->num_outputs));
  }
  // A cell index must fit 32 bits.
  constexpr int64_t kMostGrids = 46339;
  if (desc->num_grids < 3 || desc->num_grids > kMostGrids) {
    return Fail(LMKAN_INVALID_ARGUMENT, message,
                "expected 3 to %lld grid cells an axis, found %lld",
                static_cast<long long>(kMostGrids), static_cast<long long>(desc->num_grids));
  }
  if (TableBytes(*desc) == 0) {
    return Fail(
        LMKAN_INVALID_ARGUMENT, message,
        "expected a table of less than 2^62 bytes, found %lld pairs, %lld grid cells an axis "
        "and %lld outputs",
        static_cast<long long>(desc->num_pairs), static_cast<long long>(desc->num_grids),
        static_cast<long long>(desc->num_outputs));
  }
  return LMKAN_OK;
}

void PackFloats(const lmkan_cpu_table& table, const char* from, char* to) {
  const size_t element = ElementSize(table.dtype);
  for (int64_t b = 0; b < table.num_blocks; ++b) {
    const Block block = table.block(b);
    char* row = to + block.offset * element;
    const char* source = from + block.first_output * element;
    for (int64_t i = 0; i < table.num_pairs * table.num_cells(); ++i) {
      std::memcpy(row, source, block.outputs * element);
      row += block.width * element;
      source += table.num_outputs * element;
    }
  }
}

void PackInt8(const lmkan_cpu_table& table, const int8_t* from, Int8Pair* to) {
  const int64_t points = table.num_grids + 1;
  for (int64_t b = 0; b < table.num_blocks; ++b) {
    const Block block = table.block(b);
    Int8Pair* row = to + block.offset;
    const int8_t* source = from + block.first_output;
    for (int64_t i = 0; i < table.num_pairs * table.num_cells(); ++i) {
      const bool has_neighbour = i % points != points - 1;  // the last point's is never read
      for (int64_t o = 0; o < block.outputs; ++o) {
        row[o].corner[0] = source[o];
        row[o].corner[1] = has_neighbour ? source[o + table.num_outputs] : int8_t{0};
      }
      row += block.width;
      source += table.num_outputs;
    }
  }
}

void PackCompactInt8(const lmkan_cpu_table& table, const int8_t* from, Int8Entry* to) {
  for (int64_t b = 0; b < table.num_blocks; ++b) {
    const Block block = table.block(b);
    Int8Entry* row = to + block.offset;
    const int8_t* source = from + block.first_output;
    for (int64_t i = 0; i < table.num_pairs * table.num_cells(); ++i) {
      for (int64_t o = 0; o < block.outputs; ++o) row[CompactOffset(o)].corner = source[o];
      row += block.width;
      source += table.num_outputs;
    }
  }
}

void PackScales(const lmkan_cpu_table& table, const float* from, float* to) {
  const float one = table.compact ? kWeightOne * kEntryMultiple : kWeightOne;
  for (int64_t b = 0; b < table.num_blocks; ++b) {
    const Block block = table.block(b);
    float* row = to + block.scales;
    for (int64_t pair = 0; pair < table.num_pairs; ++pair, row += block.width) {
      const float* source = from + pair * table.num_outputs + block.first_output;
      for (int64_t o = 0; o < block.outputs; ++o) row[o] = source[o] / one;
    }
  }
}

lmkan_status Create(const lmkan_table_desc* desc, lmkan_ownership ownership, lmkan_isa isa,
                    std::unique_ptr<lmkan_cpu_table>* result, const Message& message) {
  if (const lmkan_status status = CheckDesc(desc, message); status != LMKAN_OK) return status;
  if (ownership != LMKAN_COPY && ownership != LMKAN_BORROW) {
    return Fail(LMKAN_INVALID_ARGUMENT, message,
                "expected an ownership of COPY (0) or BORROW (1), found %d", ownership);
  }
  if (isa < LMKAN_ISA_AUTO || isa > LMKAN_ISA_AVX512) {
    return Fail(
        LMKAN_INVALID_ARGUMENT, message,
        "expected an instruction set of AUTO (0), PORTABLE (1), AVX2 (2) or AVX512 (3), found %d",
        isa);
  }
  const KernelSet* kernels = SelectKernels(isa);
  if (kernels == nullptr) {
    return Fail(LMKAN_UNSUPPORTED, message, "this processor or build has no instruction set %d",
                isa);
  }
  auto table = std::unique_ptr<lmkan_cpu_table>(new (std::nothrow) lmkan_cpu_table);
  if (table == nullptr) return Fail(LMKAN_OUT_OF_MEMORY, message, "no memory for a table handle");
  table->kernels = kernels;
  table->dtype = desc->dtype;
  table->num_pairs = desc->num_pairs;
  table->num_grids = desc->num_grids;
  table->num_outputs = desc->num_outputs;
  table->compact = IsCompact(*table, ownership);
  table->block_outputs = BlockOutputs(*table, ownership);
  table->num_blocks = (desc->num_outputs + table->block_outputs - 1) / table->block_outputs;
  table->chunk_rows = ChunkRows(*table);
  table->whole_slice_rows = WholeSliceRows(*table);

  const size_t grid_bytes = static_cast<size_t>(desc->num_grids) * sizeof(GridCell);
  table->grid_cells.reset(static_cast<GridCell*>(AllocateAligned(grid_bytes)));
  if (table->grid_cells == nullptr) {
    return Fail(LMKAN_OUT_OF_MEMORY, message, "no memory for a grid of %zu bytes", grid_bytes);
  }
  FillGrid(desc->num_grids, table->grid_cells.get());

  // A partial vector at the end of a borrowed row would read past the table.
  table->packed = ownership == LMKAN_COPY || desc->num_outputs % kernels->lanes != 0 ||
                  desc->dtype == LMKAN_INT8;
  table->data = desc->data;
  if (table->packed) {
    const Block last = table->block(table->num_blocks - 1);
    const size_t bytes = static_cast<size_t>((last.offset + table->num_pairs * last.strides.pair) *
                                             table->element_size());
    table->storage.reset(AllocateAligned(bytes));
    if (table->storage == nullptr) {
      return Fail(LMKAN_OUT_OF_MEMORY, message, "no memory for a table of %zu bytes", bytes);
    }
    table->data = table->storage.get();
  }
  if (desc->dtype == LMKAN_INT8) {
    const Block last = table->block(table->num_blocks - 1);
    const size_t bytes =
        static_cast<size_t>(last.scales + table->num_pairs * last.width) * sizeof(float);
    table->scales.reset(static_cast<float*>(AllocateAligned(bytes)));
    if (table->scales == nullptr) {
      return Fail(LMKAN_OUT_OF_MEMORY, message, "no memory for scales of %zu bytes", bytes);
    }
    PackScales(*table, desc->scales, table->scales.get());
    const auto* entries = static_cast<const int8_t*>(desc->data);
    if (table->compact) {
      PackCompactInt8(*table, entries, static_cast<Int8Entry*>(table->storage.get()));
    } else {
      PackInt8(*table, entries, static_cast<Int8Pair*>(table->storage.get()));
    }
  } else if (table->packed) {
    PackFloats(*table, static_cast<const char*>(desc->data),
               static_cast<char*>(table->storage.get()));
  }
  *result = std::move(table);
  return LMKAN_OK;
}

}  // namespace
}  // namespace lmkan::cpu

Block lmkan_cpu_table::block(int64_t index) const {
  Block block;
  block.first_output = index * block_outputs;
  const int64_t left = num_outputs - block.first_output;
  block.outputs = left < block_outputs ? left : block_outputs;
  const int64_t multiple = compact ? lmkan::cpu::kCompactBlockOutputs : kernels->lanes;
  block.width = (block.outputs + multiple - 1) / multiple * multiple;
  block.strides.cell = packed ? block.width : num_outputs;
  block.strides.line = (num_grids + 1) * block.strides.cell;
  block.strides.pair = num_cells() * block.strides.cell;
  // Between full blocks; the last one may be narrower.
  block.strides.block = packed ? num_pairs * block.strides.pair : block.width;
  block.offset = packed ? block.first_output * num_pairs * num_cells() : block.first_output;
  block.scales = block.first_output * num_pairs;
  return block;
}

lmkan_status lmkan_cpu_table_create(const lmkan_table_desc* desc, lmkan_ownership ownership,
                                    lmkan_isa isa, lmkan_cpu_table** table, char* message,
                                    size_t message_size) {
  const Message out{message, message_size};
  if (table == nullptr) {
    return Fail(LMKAN_INVALID_ARGUMENT, out,
                "expected a place for the handle, found a null pointer");
  }
  *table = nullptr;
  std::unique_ptr<lmkan_cpu_table> result;
  const lmkan_status status = lmkan::cpu::Create(desc, ownership, isa, &result, out);
  *table = result.release();
  return status;
}

void lmkan_cpu_table_destroy(lmkan_cpu_table* table) { delete table; }

const char* lmkan_cpu_table_isa(const lmkan_cpu_table* table) {
  return table == nullptr ? "" : table->kernels->name;
}
