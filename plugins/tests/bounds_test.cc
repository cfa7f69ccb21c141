// Lookups touch no byte outside of x, y, the table and its scales, and write none but those of y.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <string>

#include "array.h"
#include "check.h"
#include "cpu_table.h"
#include "guarded_memory.h"
#include "inputs.h"
#include "oracle.h"

namespace lmkan::test {
namespace {

// What is being looked up, for the signal handler.
char current_case[256];

// A fault says nothing by itself; the address sanitizer has a better report of its own.
#if !defined(__SANITIZE_ADDRESS__)
void ReportFault(int) {
  const char text[] = "access to a guard page, or writing to x, the table or its scales: ";
  ssize_t ignored = write(STDERR_FILENO, text, sizeof text - 1);
  ignored = write(STDERR_FILENO, current_case, std::strlen(current_case));
  ignored = write(STDERR_FILENO, "\n", 1);
  static_cast<void>(ignored);
  _exit(1);
}

void ReportFaults() {
  std::signal(SIGSEGV, ReportFault);
  std::signal(SIGBUS, ReportFault);
}
#else
void ReportFaults() {}
#endif

// Finite features, and in half of the groups some that send a careless cell index anywhere: any
// bits; the largest numbers, infinities and NaNs, of both signs.
Array MakeWildX(const Shape& shape, lmkan_dtype dtype) {
  Array x = MakeX(shape, dtype, 2);
  const uint32_t infinity = Encode(dtype, HUGE_VAL);
  const uint32_t sign = dtype == LMKAN_FLOAT32 ? 0x80000000u : 0x8000u;
  const uint32_t extremes[] = {infinity - 1, infinity, infinity + 1};
  Random random(static_cast<uint64_t>(shape.num_outputs));
  bool is_wild = false;
  for (int64_t i = 0; i < x.size(); ++i) {
    if (i % (2 * shape.num_pairs) % (2 * kGroupPairs) == 0) is_wild = random.Index(2) == 0;
    const int64_t kind = random.Index(8);
    if (is_wild && kind < 2) x.SetBits(i, static_cast<uint32_t>(random.Bits()));
    if (is_wild && kind == 2) {
      x.SetBits(i, extremes[random.Index(3)] | (random.Index(2) == 0 ? sign : 0));
    }
  }
  return x;
}

// A copy of an array that only reading leaves as it is.
class GuardedCopy {
 public:
  GuardedCopy(Placement placement, const Array& values)
      : values_(values), memory_(placement, values.num_bytes()) {
    std::copy_n(values.data(), values.num_bytes(), memory_.data());
    memory_.MakeReadOnly();
  }

  // Null when it is empty.
  const void* data() { return values_.size() == 0 ? nullptr : memory_.data(); }

  bool IsUnchanged() {
    return memory_.PatternIsIntact() &&
           std::equal(values_.data(), values_.data() + values_.num_bytes(), memory_.data());
  }

 private:
  const Array& values_;
  GuardedMemory memory_;
};

void TestShape(const Shape& shape, lmkan_isa isa, lmkan_dtype table_dtype, lmkan_dtype x_dtype,
               lmkan_ownership ownership) {
  const Table table_values = MakeTable(shape, table_dtype, 1);
  const Array x_values = MakeWildX(shape, x_dtype);
  for (const Placement placement : kPlacements) {
    const std::string label = Describe(isa, table_dtype, x_dtype, ownership) + ", " +
                              shape.ToString() + ", " + Name(placement);
    std::snprintf(current_case, sizeof current_case, "%s", label.c_str());
    GuardedCopy entries(placement, table_values.entries);
    GuardedCopy scales(placement, table_values.scales);
    GuardedCopy x(placement, x_values);
    const TableHandle handle =
        CreateTable(shape, table_dtype, entries.data(), static_cast<const float*>(scales.data()),
                    ownership, isa);
    if (handle == nullptr) return;
    for (const int64_t num_tasks : {int64_t{1}, int64_t{3}, shape.rows + 1}) {
      GuardedMemory y(placement, static_cast<size_t>(shape.y_size()) * ElementSize(x_dtype));
      if (!Lookup(handle.get(), x_dtype, x.data(), y.data(), shape.rows, num_tasks)) return;
      LMKAN_EXPECT(y.PatternIsIntact(), "%s: %d tasks wrote outside of y", label.c_str(),
                   static_cast<int>(num_tasks));
    }
    LMKAN_EXPECT(entries.IsUnchanged() && scales.IsUnchanged() && x.IsUnchanged(), "%s",
                 label.c_str());
  }
}

// Without rows nothing is touched, not even memory that isn't there.
void TestNoRows(lmkan_isa isa) {
  const Shape shape = {2, 4, 9, 0};
  for (const lmkan_dtype table_dtype : kTableDtypes) {
    const Table table = MakeTable(shape, table_dtype, 1);
    const TableHandle handle = CreateTable(table, LMKAN_COPY, isa);
    if (handle == nullptr) return;
    for (const lmkan_dtype dtype : kXDtypes) {
      unsigned char y[64];
      std::memset(y, 0x55, sizeof y);
      Lookup(handle.get(), dtype, nullptr, nullptr, 0, 3);
      Lookup(handle.get(), dtype, nullptr, y, 0, 3);
      for (const unsigned char byte : y) LMKAN_EXPECT(byte == 0x55, "y was written without rows");
    }
  }
}

}  // namespace
}  // namespace lmkan::test

int main(int argc, char** argv) {
  using namespace lmkan::test;
  constexpr int64_t kOutputs[] = {1, 3, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 100, 111, 129};
  constexpr int64_t kRows[] = {1, 2, 5, 6, 7, 19};
  constexpr int64_t kPairs[] = {1, 2, 3, 4, 5, 9, 19};
  constexpr int64_t kGrids[] = {3, 4, 8, 40};
  ReportFaults();
  return RunForIsa(argc, argv, [&](lmkan_isa isa) {
    size_t turn = 0;
    for (const int64_t outputs : kOutputs) {
      for (const int64_t rows : kRows) {
        const Shape shape = {kPairs[turn % 7], kGrids[turn % 4], outputs, rows};
        ++turn;
        for (const lmkan_dtype table_dtype : kTableDtypes) {
          for (const lmkan_ownership ownership : kOwnerships) {
            // The types of x and of the table don't meet before the sums: rotate through them.
            const lmkan_dtype x_dtype = kXDtypes[(turn + table_dtype) % 3];
            TestShape(shape, isa, table_dtype, x_dtype, ownership);
          }
        }
      }
    }
    TestNoRows(isa);
  });
}
