// How the kernels themselves read and write each type: every float16, bfloat16 and int8 number as a
// table entry, every float16 and bfloat16 number as a feature, scales, and rounding of y.
//
// At x = 0 and even G the position in the cell is exactly 0, so y is one table entry.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "array.h"
#include "check.h"
#include "cpu_table.h"
#include "oracle.h"

namespace lmkan::test {
namespace {

// Looks up x = (0, 0) with `entries` in the middle of the grid and zeros around them. `scales`, one
// an entry, belongs to int8 entries.
Array LookUpEntries(lmkan_isa isa, lmkan_ownership ownership, const Array& entries,
                    lmkan_dtype x_dtype, const std::vector<float>& scales = {}) {
  const Shape shape = {1, 4, entries.size(), 1};
  Table table(shape, entries.dtype());
  for (int64_t o = 0; o < entries.size(); ++o) {
    table.entries.SetBits((2 * 5 + 2) * entries.size() + o, entries.GetBits(o));
  }
  for (int64_t o = 0; o < table.scales.size(); ++o) table.scales.Set(o, scales[o]);
  const Array x(x_dtype, 2);
  Array y(x_dtype, entries.size());
  const TableHandle handle = CreateTable(table, ownership, isa);
  if (handle != nullptr) Lookup(handle.get(), x_dtype, x.data(), y.data(), 1, 1);
  return y;
}

void ExpectEntries(const Array& entries, const Array& y, const std::string& label) {
  for (int64_t o = 0; o < entries.size(); ++o) {
    const double entry = entries.Get(o);
    const double expected = Round(y.dtype(), entry);
    const double found = y.Get(o);
    // 0 * infinity may have turned an infinity into NaN.
    const bool same = std::isfinite(entry) ? found == expected : !std::isfinite(found);
    LMKAN_EXPECT(same, "%s: the entry 0x%x, %.9g, becomes %.9g, not %.9g", label.c_str(),
                 entries.GetBits(o), entry, found, expected);
  }
}

void TestEveryTableEntry(lmkan_isa isa) {
  for (const lmkan_dtype dtype : {LMKAN_FLOAT16, LMKAN_BFLOAT16}) {
    Array entries(dtype, 0x10000);
    for (int64_t bits = 0; bits < entries.size(); ++bits) {
      entries.SetBits(bits, static_cast<uint32_t>(bits));
    }
    for (const lmkan_ownership ownership : kOwnerships) {
      for (const lmkan_dtype x_dtype : kXDtypes) {
        ExpectEntries(entries, LookUpEntries(isa, ownership, entries, x_dtype),
                      Describe(isa, dtype, x_dtype, ownership));
      }
    }
  }
}

// y is the entry times the scale, rounded to float32 once, for all scales that are multiples of
// 2^-127: a scale is stored in units of 2^-14, or of 2^-22 in compact tables.
void TestEveryInt8Entry(lmkan_isa isa) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kScales[] = {1.0f,           0.1f,      -1.0f / 3,  0.0f,
                               -0.0f,          0x1p-126f, 0x1p-127f,  -0x3p-127f,
                               kLargest / 128, kLargest,  -kInfinity, kNan};
  Array entries(LMKAN_INT8, 256 * static_cast<int64_t>(std::size(kScales)));
  std::vector<float> scales;
  for (int64_t i = 0; i < entries.size(); ++i) {
    entries.SetBits(i, static_cast<uint32_t>(i % 256));
    scales.push_back(kScales[i / 256]);
  }
  for (const lmkan_ownership ownership : kOwnerships) {
    for (const lmkan_dtype x_dtype : kXDtypes) {
      const Array y = LookUpEntries(isa, ownership, entries, x_dtype, scales);
      for (int64_t i = 0; i < entries.size(); ++i) {
        const double product = entries.Get(i) * scales[i];
        const double expected = Round(x_dtype, Round(LMKAN_FLOAT32, product));
        const double found = y.Get(i);
        const bool same = std::isfinite(scales[i]) ? found == expected : !std::isfinite(found);
        LMKAN_EXPECT(same, "%s: the entry %g of scale %.9g becomes %.9g, not %.9g",
                     Describe(isa, LMKAN_INT8, x_dtype, ownership).c_str(), entries.Get(i),
                     double{scales[i]}, found, expected);
      }
    }
  }
}

// The middles between neighbouring numbers of y's type, and the float32 numbers next to them.
void TestRoundingOfY(lmkan_isa isa) {
  for (const lmkan_dtype dtype : {LMKAN_FLOAT16, LMKAN_BFLOAT16}) {
    const uint32_t infinity = Encode(dtype, std::numeric_limits<double>::infinity());
    std::vector<float> values;
    for (uint32_t bits = 1; bits < infinity; ++bits) {
      const double next = bits + 1 < infinity ? Decode(dtype, bits + 1)
                                              : 2 * Decode(dtype, bits) - Decode(dtype, bits - 1);
      const auto middle = static_cast<float>((Decode(dtype, bits) + next) / 2);
      values.push_back(middle);
      values.push_back(-std::nextafter(middle, 0.0f));
      values.push_back(std::nextafter(middle, std::numeric_limits<float>::infinity()));
    }
    Array entries(LMKAN_FLOAT32, static_cast<int64_t>(values.size()));
    for (int64_t i = 0; i < entries.size(); ++i) entries.Set(i, values[i]);
    ExpectEntries(entries, LookUpEntries(isa, LMKAN_COPY, entries, dtype),
                  Describe(isa, LMKAN_FLOAT32, dtype, LMKAN_COPY));
  }
}

void TestEveryFeature(lmkan_isa isa) {
  for (const lmkan_dtype dtype : {LMKAN_FLOAT16, LMKAN_BFLOAT16}) {
    // Features of one row are (bits, bits + 1): each number comes first and second.
    const Shape shape = {1, 8, 3, 0x10000};
    Array x(dtype, shape.x_size());
    for (int64_t r = 0; r < shape.rows; ++r) {
      x.SetBits(2 * r, static_cast<uint32_t>(r));
      x.SetBits(2 * r + 1, static_cast<uint32_t>((r + 1) % shape.rows));
    }
    Table table(shape, LMKAN_FLOAT32);
    for (int64_t i = 0; i < table.entries.size(); ++i) {
      table.entries.Set(i, std::sin(static_cast<double>(i)));
    }
    Array y(dtype, shape.y_size());
    const TableHandle handle = CreateTable(table, LMKAN_COPY, isa);
    if (handle == nullptr || !Lookup(handle.get(), dtype, x.data(), y.data(), shape.rows, 1))
      return;
    Reference reference = Evaluate(shape, x.ToDoubles(), table.ToDoubles());
    // float32 weights overflow for the largest bfloat16 features: any y is right there.
    for (int64_t i = 0; i < shape.y_size(); ++i) {
      const int64_t r = i / shape.num_outputs;
      const double largest = std::max(std::fabs(x.Get(2 * r)), std::fabs(x.Get(2 * r + 1)));
      if (std::isfinite(largest) && largest > 1e18) {
        reference.bound[i] = std::numeric_limits<double>::infinity();
        y.Set(i, 0);
      }
    }
    ExpectClose(shape, reference, y, Describe(isa, LMKAN_FLOAT32, dtype, LMKAN_COPY));
  }
}

}  // namespace
}  // namespace lmkan::test

int main(int argc, char** argv) {
  using namespace lmkan::test;
  return RunForIsa(argc, argv, [](lmkan_isa isa) {
    TestEveryTableEntry(isa);
    TestEveryInt8Entry(isa);
    TestRoundingOfY(isa);
    TestEveryFeature(isa);
  });
}
