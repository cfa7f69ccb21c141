// Lookups of one instruction set against the float64 oracle: all types, both ownerships, awkward
// sizes.
#include <cstring>
#include <iterator>
#include <vector>

#include "array.h"
#include "check.h"
#include "cpu_table.h"
#include "inputs.h"
#include "oracle.h"

namespace lmkan::test {
namespace {

// Every number of outputs meets every number of rows; pairs and grids rotate through them.
std::vector<Shape> MakeShapes() {
  constexpr int64_t kPairs[] = {1, 2, 3, 4, 5, 9, 19};
  constexpr int64_t kGrids[] = {3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 26, 40};
  constexpr int64_t kOutputs[] = {1, 3, 7, 8, 9, 16, 17, 31, 33, 63, 64, 65, 100, 111, 129};
  constexpr int64_t kRows[] = {0, 1, 2, 5, 6, 7, 19, 111};
  // Large tables take long to make and find nothing that small ones don't.
  constexpr int64_t kMostEntries = 50000;
  std::vector<Shape> shapes;
  size_t turn = 0;
  for (const int64_t outputs : kOutputs) {
    for (const int64_t rows : kRows) {
      Shape shape = {kPairs[turn % std::size(kPairs)], kGrids[turn % std::size(kGrids)], outputs,
                     rows};
      if (shape.table_size() > kMostEntries) shape.num_grids = 3 + static_cast<int64_t>(turn % 2);
      shapes.push_back(shape);
      ++turn;
    }
  }
  // A large table, and more rows than kernels handle at a time.
  shapes.insert(shapes.end(), {{19, 40, 16, 19},
                               {1, 40, 129, 7},
                               {5, 40, 129, 1},
                               {1, 40, 1, 989},
                               {3, 13, 17, 989},
                               {5, 8, 64, 1025},
                               {9, 3, 9, 1600},
                               {1, 40, 17, 6000},
                               {19, 4, 65, 1025},
                               {2, 4, 129, 2500}});
  return shapes;
}

void TestShape(const Shape& shape, lmkan_isa isa, uint64_t seed) {
  for (const lmkan_dtype table_dtype : kTableDtypes) {
    const Table table = MakeTable(shape, table_dtype, seed);
    const std::vector<double> entries = table.ToDoubles();
    for (const lmkan_dtype x_dtype : kXDtypes) {
      const Array x = MakeX(shape, x_dtype, seed + 1);
      const Reference reference = Evaluate(shape, x.ToDoubles(), entries, table_dtype);
      for (const lmkan_ownership ownership : kOwnerships) {
        Table memory = table;
        const TableHandle handle = CreateTable(memory, ownership, isa);
        if (handle == nullptr) return;
        // A copied table must not look at the caller's memory again, and a y that is added to, or
        // not written, must show: all ones are NaN in every type.
        if (ownership == LMKAN_COPY) {
          memory.entries.Fill(0xff);
          memory.scales.Fill(0xff);
        }
        Array y(x_dtype, shape.y_size());
        y.Fill(0xff);
        const int64_t num_tasks = lmkan_cpu_num_tasks(handle.get(), shape.rows, 2);
        if (!Lookup(handle.get(), x_dtype, x.data(), y.data(), shape.rows, num_tasks)) return;
        ExpectClose(shape, reference, y,
                    Describe(isa, table_dtype, x_dtype, ownership) + ", " + shape.ToString());
      }
    }
  }
}

// Every position around the outermost cells in which weights are rounded, with the entries that
// make the largest sums of integers: -128 and 127 in all patterns of signs.
void TestLargestIntegers(lmkan_isa isa, int64_t outputs, lmkan_ownership ownership) {
  constexpr int64_t kSteps = 111;  // fiftieths of a cell, -0.6 ... 1.6
  const Shape shape = {1, 4, outputs, kSteps * kSteps};
  Table table(shape, LMKAN_INT8);
  for (int64_t o = 0; o < outputs; ++o) table.scales.Set(o, 0.01);
  for (int64_t i = 0; i < table.entries.size(); ++i) {
    const int64_t o = i % outputs % 4, i2 = i / outputs % 5, i1 = i / outputs / 5;
    table.entries.Set(i, (i1 * (o / 2) + i2 * (o % 2)) % 2 == 0 ? -128 : 127);
  }
  const double width = GridPoint(4, 1) - GridPoint(4, 0);
  const auto feature = [width](int64_t step) {
    const double d = static_cast<double>(step) / 50 - 0.6;
    return d < 0.5 ? GridPoint(4, 0) + d * width : GridPoint(4, 3) + d * width;
  };
  Array x(LMKAN_FLOAT32, shape.x_size());
  for (int64_t r = 0; r < shape.rows; ++r) {
    x.Set(2 * r, feature(r / kSteps));
    x.Set(2 * r + 1, feature(r % kSteps));
  }
  const TableHandle handle = CreateTable(table, ownership, isa);
  Array y(LMKAN_FLOAT32, shape.y_size());
  if (handle == nullptr ||
      !Lookup(handle.get(), LMKAN_FLOAT32, x.data(), y.data(), shape.rows, 1)) {
    return;
  }
  ExpectClose(shape, Evaluate(shape, x.ToDoubles(), table.ToDoubles(), LMKAN_INT8), y,
              Describe(isa, LMKAN_INT8, LMKAN_FLOAT32, ownership) + ", largest integers, " +
                  shape.ToString());
}

// AUTO is one of the instruction sets that this processor has, to the last bit.
void TestAuto(lmkan_isa isa) {
  for (const int64_t outputs : {1, 8, 9, 16, 129}) {
    const Shape shape = {5, 8, outputs, 19};
    const Table table = MakeTable(shape, LMKAN_FLOAT32, 1);
    const Array x = MakeX(shape, LMKAN_FLOAT32, 2);
    const TableHandle chosen = CreateTable(table, LMKAN_COPY, LMKAN_ISA_AUTO);
    const TableHandle named = CreateTable(table, LMKAN_COPY, isa);
    if (chosen == nullptr || named == nullptr) return;
    const char* name = lmkan_cpu_table_isa(chosen.get());
    bool known = false;
    for (const lmkan_isa other : {LMKAN_ISA_PORTABLE, LMKAN_ISA_AVX2, LMKAN_ISA_AVX512}) {
      if (std::strcmp(name, IsaName(other)) == 0) known = ProcessorHas(other);
    }
    LMKAN_EXPECT(known, "AUTO chose \"%s\"", name);
    if (std::strcmp(name, IsaName(isa)) != 0) continue;
    Array y_chosen(LMKAN_FLOAT32, shape.y_size());
    Array y_named(LMKAN_FLOAT32, shape.y_size());
    Lookup(chosen.get(), LMKAN_FLOAT32, x.data(), y_chosen.data(), shape.rows, 1);
    Lookup(named.get(), LMKAN_FLOAT32, x.data(), y_named.data(), shape.rows, 1);
    LMKAN_EXPECT(std::memcmp(y_chosen.data(), y_named.data(), y_named.num_bytes()) == 0,
                 "AUTO differs from %s, which it chose, at %d outputs", name,
                 static_cast<int>(outputs));
  }
}

}  // namespace
}  // namespace lmkan::test

int main(int argc, char** argv) {
  using namespace lmkan::test;
  return RunForIsa(argc, argv, [](lmkan_isa isa) {
    uint64_t seed = 0;
    for (const Shape& shape : MakeShapes()) TestShape(shape, isa, seed += 2);
    TestLargestIntegers(isa, 4, LMKAN_COPY);
    TestLargestIntegers(isa, 64, LMKAN_BORROW);  // a compact table
    TestAuto(isa);
  });
}
