// A non-finite feature makes its row non-finite and changes no bit of any other row.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "array.h"
#include "check.h"
#include "cpu_table.h"
#include "inputs.h"
#include "oracle.h"

namespace lmkan::test {
namespace {

// Infinities, and NaNs quiet and signalling, of both signs.
std::vector<uint32_t> NonfiniteBits(lmkan_dtype dtype) {
  switch (dtype) {
    case LMKAN_FLOAT16:
      return {0x7c00, 0xfc00, 0x7e00, 0xfe00, 0x7c01, 0xfdff, 0x7fff};
    case LMKAN_BFLOAT16:
      return {0x7f80, 0xff80, 0x7fc0, 0xffc0, 0x7f81, 0xffbf, 0x7fff};
    default:
      return {0x7f800000, 0xff800000, 0x7fc00000, 0xffc00000, 0x7f800001, 0xffbfffff, 0x7fffffff};
  }
}

void TestShape(const Shape& shape, lmkan_isa isa, lmkan_dtype table_dtype, lmkan_dtype x_dtype,
               lmkan_ownership ownership, bool zero_table) {
  const std::string label = Describe(isa, table_dtype, x_dtype, ownership) + ", " +
                            shape.ToString() + (zero_table ? ", table of zeros" : "");
  const Table table = zero_table ? Table(shape, table_dtype) : MakeTable(shape, table_dtype, 1);
  const Array x = MakeX(shape, x_dtype, 2);
  const TableHandle handle = CreateTable(table, ownership, isa);
  if (handle == nullptr) return;
  Array y(x_dtype, shape.y_size());
  if (!Lookup(handle.get(), x_dtype, x.data(), y.data(), shape.rows, 1)) return;

  const size_t row_bytes = static_cast<size_t>(shape.num_outputs) * ElementSize(x_dtype);
  const int64_t features = 2 * shape.num_pairs;
  const std::vector<uint32_t> values = NonfiniteBits(x_dtype);
  for (int64_t feature = 0; feature < features; ++feature) {
    for (size_t v = 0; v < values.size(); ++v) {
      // The rows take turns, and the first and the last are among them.
      const int64_t turn = feature * static_cast<int64_t>(values.size()) + static_cast<int64_t>(v);
      const int64_t bad = turn % 3 == 0 ? shape.rows - 1 : turn % shape.rows;
      Array bad_x = x;
      bad_x.SetBits(bad * features + feature, values[v]);
      Array bad_y(x_dtype, shape.y_size());
      if (!Lookup(handle.get(), x_dtype, bad_x.data(), bad_y.data(), shape.rows, 1)) return;
      for (int64_t r = 0; r < shape.rows; ++r) {
        if (r != bad) {
          LMKAN_EXPECT(std::memcmp(y.at(r * shape.num_outputs), bad_y.at(r * shape.num_outputs),
                                   row_bytes) == 0,
                       "%s: 0x%x in x[%d][%d] changes row %d", label.c_str(), values[v],
                       static_cast<int>(bad), static_cast<int>(feature), static_cast<int>(r));
          continue;
        }
        for (int64_t o = 0; o < shape.num_outputs; ++o) {
          const double found = bad_y.Get(r * shape.num_outputs + o);
          LMKAN_EXPECT(!std::isfinite(found), "%s: 0x%x in x[%d][%d] leaves y[%d][%d] at %g",
                       label.c_str(), values[v], static_cast<int>(bad), static_cast<int>(feature),
                       static_cast<int>(r), static_cast<int>(o), found);
        }
      }
    }
  }
}

}  // namespace
}  // namespace lmkan::test

int main(int argc, char** argv) {
  using namespace lmkan::test;
  constexpr Shape kShapes[] = {{1, 3, 1, 1},   {4, 4, 8, 2},   {5, 8, 33, 5},
                               {9, 13, 17, 6}, {3, 40, 65, 7}, {19, 4, 9, 19}};
  return RunForIsa(argc, argv, [&](lmkan_isa isa) {
    for (const Shape& shape : kShapes) {
      for (const lmkan_dtype table_dtype : kTableDtypes) {
        for (const lmkan_dtype x_dtype : kXDtypes) {
          for (const lmkan_ownership ownership : kOwnerships) {
            TestShape(shape, isa, table_dtype, x_dtype, ownership, false);
          }
          TestShape(shape, isa, table_dtype, x_dtype, LMKAN_COPY, true);
        }
      }
    }
  });
}
