// What tests need around the C interface: handles that free themselves, whole lookups, and one test
// run for each instruction set.
#ifndef LMKAN_TESTS_CPU_TABLE_H_
#define LMKAN_TESTS_CPU_TABLE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "array.h"
#include "lmkan/lookup2d.h"
#include "oracle.h"
#include "table.h"

namespace lmkan::test {

struct DestroyTable {
  void operator()(lmkan_cpu_table* table) const { lmkan_cpu_table_destroy(table); }
};
using TableHandle = std::unique_ptr<lmkan_cpu_table, DestroyTable>;

inline constexpr lmkan_ownership kOwnerships[] = {LMKAN_COPY, LMKAN_BORROW};

const char* IsaName(lmkan_isa isa);
const char* OwnershipName(lmkan_ownership ownership);

// Whether this processor, and a build for it, has an instruction set.
bool ProcessorHas(lmkan_isa isa);

// A handle that the test expects to get; null, and a failure, when it doesn't.
TableHandle CreateTable(const Table& table, lmkan_ownership ownership, lmkan_isa isa);

// The same for a table that lies elsewhere; scales is null unless dtype is INT8.
TableHandle CreateTable(const Shape& shape, lmkan_dtype dtype, const void* data,
                        const float* scales, lmkan_ownership ownership, lmkan_isa isa);

// All tasks of a lookup, first to last. A failure, and false, when one of them fails.
bool Lookup(const lmkan_cpu_table* table, lmkan_dtype dtype, const void* x, void* y, int64_t rows,
            int64_t num_tasks);

// The main function of a test that takes an instruction set's name as its argument. Where the
// processor lacks it, checks that tables for it are refused and returns kSkipped.
int RunForIsa(int argc, char** argv, const std::function<void(lmkan_isa)>& test);

// "avx2, table float16, x float32, copy".
std::string Describe(lmkan_isa isa, lmkan_dtype table_dtype, lmkan_dtype x_dtype,
                     lmkan_ownership ownership);

}  // namespace lmkan::test

#endif  // LMKAN_TESTS_CPU_TABLE_H_
