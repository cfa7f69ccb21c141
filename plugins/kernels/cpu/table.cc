// Checks a table description and lays the table out for the kernels.
#include "table.h"

#include <algorithm>
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

#include "int8_layout.h"
#include "status.h"

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

void PackInt8(const lmkan_cpu_table& table, const int8_t* from, int8_t* to) {
  for (int64_t b = 0; b < table.num_blocks; ++b) {
    const Block block = table.block(b);
    int64_t offsets[kMaxInt8BlockOutputs];
    for (int64_t o = 0; o < block.outputs; ++o) offsets[o] = Int8Offset(block.width, o);
    int8_t* corner = to + block.offset;
    const int8_t* source = from + block.first_output;
    for (int64_t i = 0; i < table.num_pairs * table.num_cells(); ++i) {
      for (int64_t o = 0; o < block.outputs; ++o) corner[offsets[o]] = source[o];
      corner += block.width;
      source += table.num_outputs;
    }
  }
}

// The unit of a group of scales, `stride` apart, and their multiples of it, 2 * `width` apart from
// one two pairs to the next. A scale that is not finite makes the unit NaN.
float SplitScales(const float* scales, int64_t stride, int64_t pairs, int64_t width,
                  int16_t* multiples) {
  float largest = 0;
  for (int64_t p = 0; p < pairs; ++p) {
    const float size = std::fabs(scales[p * stride]);
    if (!std::isfinite(size)) return std::numeric_limits<float>::quiet_NaN();
    largest = std::max(largest, size);
  }
  if (largest == 0) return 0;
  const double one = double{largest} / kScaleOne;
  for (int64_t p = 0; p < pairs; ++p) {
    multiples[p / 2 * 2 * width + p % 2] =
        static_cast<int16_t>(std::nearbyint(scales[p * stride] / one));
  }
  return static_cast<float>(one / kValueOne);
}

void PackScales(const lmkan_cpu_table& table, const float* from, int16_t* multiples, float* units) {
  for (int64_t b = 0; b < table.num_blocks; ++b) {
    const Block block = table.block(b);
    for (int64_t g = 0; g < table.num_groups(); ++g) {
      const int64_t first_pair = g * kGroupPairs;
      const int64_t pairs = std::min<int64_t>(kGroupPairs, table.num_pairs - first_pair);
      for (int64_t o = 0; o < block.outputs; ++o) {
        units[block.units + g * block.width + o] = SplitScales(
            from + first_pair * table.num_outputs + block.first_output + o, table.num_outputs,
            pairs, block.width, multiples + block.multiples + first_pair * block.width + 2 * o);
      }
    }
  }
}

// Bytes of a core's second-level cache, or a usual size where the system doesn't say. No more than
// was measured: several cores may share a larger one.
int64_t SecondLevelCache() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return bytes < int64_t{2} << 20 ? bytes : int64_t{2} << 20;
#endif
  return int64_t{1} << 20;
}

// Outputs of a block. One pass reads a group of pairs of a block, a slice: the narrower the block,
// the nearer to the core the slice stays, and with it the next slice that is being fetched. But a
// corner should fill a cache line.
int64_t BlockOutputs(const lmkan_cpu_table& table, lmkan_ownership ownership) {
  if (table.dtype == LMKAN_INT8) return table.kernels->int8_outputs;
  constexpr int64_t kCacheLine = 64;
  // Borrowed corners lie num_outputs apart, which is no better for narrow blocks.
  if (ownership == LMKAN_BORROW) return kMaxBlockOutputs;
  const int64_t element = table.element_size();
  const int64_t widest_slice = kGroupPairs * table.num_cells() * kMaxBlockOutputs * element;
  if (widest_slice <= SecondLevelCache() / 8) return kMaxBlockOutputs;
  return kCacheLine / element;
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
  table->block_outputs = BlockOutputs(*table, ownership);
  table->num_blocks = (desc->num_outputs + table->block_outputs - 1) / table->block_outputs;

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
    const auto multiples =
        static_cast<size_t>(last.multiples + 2 * ((table->num_pairs + 1) / 2) * last.width) *
        sizeof(int16_t);
    const auto units =
        static_cast<size_t>(last.units + table->num_groups() * last.width) * sizeof(float);
    table->multiples.reset(static_cast<int16_t*>(AllocateAligned(multiples)));
    table->units.reset(static_cast<float*>(AllocateAligned(units)));
    if (table->multiples == nullptr || table->units == nullptr) {
      return Fail(LMKAN_OUT_OF_MEMORY, message, "no memory for scales of %zu bytes",
                  multiples + units);
    }
    PackScales(*table, desc->scales, table->multiples.get(), table->units.get());
    PackInt8(*table, static_cast<const int8_t*>(desc->data),
             static_cast<int8_t*>(table->storage.get()));
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
  block.width = (block.outputs + kernels->lanes - 1) / kernels->lanes * kernels->lanes;
  if (dtype == LMKAN_INT8) {
    block.width = lmkan::cpu::kMinInt8BlockOutputs;
    while (block.width < block.outputs) block.width *= 2;
  }
  block.strides.cell = packed ? block.width : num_outputs;
  block.strides.line = (num_grids + 1) * block.strides.cell;
  block.strides.pair = num_cells() * block.strides.cell;
  // Between full blocks; the last one may be narrower.
  block.strides.block = packed ? num_pairs * block.strides.pair : block.width;
  block.offset = packed ? block.first_output * num_pairs * num_cells() : block.first_output;
  block.multiples = block.first_output * 2 * ((num_pairs + 1) / 2);
  block.units = block.first_output * num_groups();
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
