// Lookups of all tactics on a device: values against the float64 oracle, rows that must not depend
// on their batch, features that are not finite, and memory that must not be touched. With the
// argument "small" less of what only a GPU has.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "array.h"
#include "check.h"
#include "device.h"
#include "inputs.h"
#include "lmkan/lookup2d_cuda.h"
#include "oracle.h"
#include "table.h"

namespace lmkan::test {
namespace {

constexpr lmkan_cuda_tactic kTactics[] = {LMKAN_CUDA_GATHER, LMKAN_CUDA_SHARED, LMKAN_CUDA_NARROW,
                                          LMKAN_CUDA_SPLIT};

const char* TacticName(lmkan_cuda_tactic tactic) {
  constexpr const char* kNames[] = {"auto", "gather", "shared", "narrow", "split"};
  return kNames[tactic];
}

// Whether a tactic runs otherwise than on the devices before: only SHARED copies by hardware.
bool Differs(int device, lmkan_cuda_tactic tactic) {
  return device < kDevicesWithoutAccelerator || tactic == LMKAN_CUDA_SHARED;
}

// A table in device memory.
struct DeviceTable {
  DeviceTable(const Table& table, Placement placement)
      : shape(table.shape),
        entries(table.entries, placement),
        scales(table.scales, placement),
        dtype(table.dtype()) {}

  lmkan_table_desc desc() {
    return {entries.data(),    dtype,
            shape.num_pairs,   shape.num_grids,
            shape.num_outputs, static_cast<const float*>(scales.data())};
  }

  Shape shape;
  DeviceArray entries;
  DeviceArray scales;
  lmkan_dtype dtype;
};

std::string Describe(const Shape& shape, lmkan_dtype table_dtype, lmkan_dtype x_dtype,
                     lmkan_cuda_tactic tactic) {
  return std::string(TacticName(tactic)) + ", table " + DtypeName(table_dtype) + ", x " +
         DtypeName(x_dtype) + ", " + shape.ToString();
}

bool Offers(DeviceTable& table, lmkan_cuda_tactic tactic) {
  const lmkan_table_desc desc = table.desc();
  lmkan_cuda_tactic tactics[4];
  const int32_t count = lmkan_cuda_tactics(&desc, LMKAN_FLOAT32, tactics, 4);
  for (int32_t i = 0; i < count; ++i) {
    if (tactics[i] == tactic) return true;
  }
  return false;
}

// y, all ones (NaN in every type) where nothing was written.
Array Lookup(DeviceTable& table, const Array& x_values, lmkan_cuda_tactic tactic,
             Placement placement = Placement::kHeap) {
  const int64_t rows = x_values.size() / (2 * table.shape.num_pairs);
  Array y_values(x_values.dtype(), rows * table.shape.num_outputs);
  y_values.Fill(0xff);
  DeviceArray x(x_values, placement);
  DeviceArray y(y_values, placement);
  const lmkan_table_desc desc = table.desc();
  char message[256] = "";
  size_t workspace_size = 0;
  lmkan_status status = lmkan_cuda_workspace_size(&desc, x_values.dtype(), rows, tactic,
                                                  &workspace_size, message, sizeof message);
  Array workspace_values(LMKAN_FLOAT32, static_cast<int64_t>(workspace_size / sizeof(float)));
  workspace_values.Fill(0xff);
  DeviceArray workspace(workspace_values, placement);
  if (status == LMKAN_OK) {
    status =
        lmkan_cuda_lookup2d(&desc, x_values.dtype(), x.data(), y.data(), rows, tactic,
                            workspace.data(), workspace_size, nullptr, message, sizeof message);
  }
  const std::string label = Describe(table.shape, table.dtype, x_values.dtype(), tactic);
  LMKAN_EXPECT(status == LMKAN_OK, "%s: status %d, %s", label.c_str(), status, message);
  y_values = y.Read();
  LMKAN_EXPECT(x.NeighbourhoodIsIntact() && y.NeighbourhoodIsIntact() &&
                   workspace.NeighbourhoodIsIntact() && table.entries.NeighbourhoodIsIntact() &&
                   table.scales.NeighbourhoodIsIntact(),
               "%s: wrote outside of y", label.c_str());
  return y_values;
}

bool IsEqual(const unsigned char* a, const unsigned char* b, int64_t bytes) {
  return bytes == 0 || std::memcmp(a, b, static_cast<size_t>(bytes)) == 0;
}

// The kernels round the weights of an INT8 table pair by pair, not in groups: the bound is that of
// float32, and of each pair what rounding its weights adds.
Reference EvaluateByPair(const Shape& shape, const std::vector<double>& x, const Table& table) {
  const std::vector<double> entries = table.ToDoubles();
  Reference reference = Evaluate(shape, x, entries);
  if (table.dtype() != LMKAN_INT8) return reference;
  const Shape pair_shape = {1, shape.num_grids, shape.num_outputs, shape.rows};
  for (int64_t p = 0; p < shape.num_pairs; ++p) {
    std::vector<double> pair_x;
    for (int64_t r = 0; r < shape.rows; ++r) {
      pair_x.push_back(x[2 * (r * shape.num_pairs + p)]);
      pair_x.push_back(x[2 * (r * shape.num_pairs + p) + 1]);
    }
    const auto first = entries.begin() + p * pair_shape.table_size();
    const std::vector<double> pair_entries(first, first + pair_shape.table_size());
    const Reference exact = Evaluate(pair_shape, pair_x, pair_entries);
    const Reference rounded = Evaluate(pair_shape, pair_x, pair_entries, LMKAN_INT8);
    for (int64_t i = 0; i < shape.y_size(); ++i) {
      reference.bound[i] += rounded.bound[i] - exact.bound[i];
    }
  }
  return reference;
}

// --- Values
// ---------------------------------------------------------------------------------------------

// All tactics on one of the devices; AUTO is one of the tactics, to the last bit.
void TestValues(const Shape& shape, lmkan_dtype table_dtype, lmkan_dtype x_dtype, uint64_t seed) {
  const Table table = MakeTable(shape, table_dtype, seed);
  const Array x = MakeX(shape, x_dtype, seed + 1);
  const Reference reference = EvaluateByPair(shape, x.ToDoubles(), table);
  DeviceTable device_table(table, Placement::kHeap);
  UseDevice(static_cast<int>(seed / 4) % NumDevices());
  const Array chosen = Lookup(device_table, x, LMKAN_CUDA_AUTO);
  bool auto_is_known = false;
  for (const lmkan_cuda_tactic tactic : kTactics) {
    if (!Offers(device_table, tactic)) continue;
    const Array y = Lookup(device_table, x, tactic);
    ExpectClose(shape, reference, y, Describe(shape, table_dtype, x_dtype, tactic));
    auto_is_known |= IsEqual(y.data(), chosen.data(), static_cast<int64_t>(y.num_bytes()));
  }
  LMKAN_EXPECT(auto_is_known, "%s: differs from all tactics",
               Describe(shape, table_dtype, x_dtype, LMKAN_CUDA_AUTO).c_str());
}

// Every number of outputs meets every number of rows; the rest rotates.
void TestAllValues() {
  constexpr int64_t kPairs[] = {1, 3, 19, 4};
  constexpr int64_t kGrids[] = {3, 26, 4, 13, 5};
  constexpr int64_t kOutputs[] = {1, 7, 32, 33, 100, 128, 129};
  constexpr int64_t kRows[] = {0, 1, 2, 19, 111, 600};
  constexpr int64_t kMostEntries = 60000;
  uint64_t turn = 0;
  for (const int64_t outputs : kOutputs) {
    for (const int64_t rows : kRows) {
      for (const lmkan_dtype table_dtype : kTableDtypes) {
        ++turn;
        Shape shape = {kPairs[turn % 4], kGrids[turn % 5], outputs, rows};
        if (shape.table_size() > kMostEntries) shape.num_grids = 3 + static_cast<int64_t>(turn % 2);
        if (shape.rows == 600) shape.num_pairs = 1 + static_cast<int64_t>(turn % 4);
        TestValues(shape, table_dtype, kXDtypes[turn / 4 % 3], turn);
      }
    }
  }
  // All pairs of types, aligned and not.
  for (const lmkan_dtype table_dtype : kTableDtypes) {
    for (const lmkan_dtype x_dtype : kXDtypes) {
      TestValues({19, 4, 144, 23}, table_dtype, x_dtype, ++turn);
      TestValues({8, 13, 37, 5}, table_dtype, x_dtype, ++turn);
      TestValues({3, 6, 34, 70}, table_dtype, x_dtype, ++turn);
    }
    // More pairs than a block finds the places of at a time; many splits.
    TestValues({1100, 3, 16, 3}, table_dtype, LMKAN_FLOAT32, ++turn);
    TestValues({70, 3, 20, 130}, table_dtype, LMKAN_FLOAT16, ++turn);
    // Grids that are too large for shared memory, and to be passed.
    TestValues({2, 45, 9, 19}, table_dtype, LMKAN_FLOAT32, ++turn);
    TestValues({2, 251, 1, 40}, table_dtype, LMKAN_FLOAT32, ++turn);
    // Few outputs of more pairs than a warp has threads, than fit shared memory, and of more rows
    // than a block has.
    TestValues({40, 5, 1, 300}, table_dtype, LMKAN_FLOAT32, ++turn);
    TestValues({33, 28, 2, 70}, table_dtype, LMKAN_BFLOAT16, ++turn);
    TestValues({100, 12, 3, 70}, table_dtype, LMKAN_FLOAT16, ++turn);
    TestValues({65, 9, 4, 40}, table_dtype, LMKAN_FLOAT32, ++turn);
  }
}

// Every position around the outermost cells in which weights are rounded, with the entries that
// make the largest sums of integers.
void TestLargestIntegers() {
  constexpr int64_t kSteps = 56;  // twenty-fifths of a cell, -0.6 ... 1.6
  const Shape shape = {1, 4, 4, kSteps * kSteps};
  Table table(shape, LMKAN_INT8);
  for (int64_t o = 0; o < 4; ++o) table.scales.Set(o, 0.01);
  for (int64_t i = 0; i < table.entries.size(); ++i) {
    const int64_t o = i % 4, i2 = i / 4 % 5, i1 = i / 20;
    table.entries.Set(i, (i1 * (o / 2) + i2 * (o % 2)) % 2 == 0 ? -128 : 127);
  }
  const double width = GridPoint(4, 1) - GridPoint(4, 0);
  const auto feature = [width](int64_t step) {
    const double d = static_cast<double>(step) / 25 - 0.6;
    return d < 0.5 ? GridPoint(4, 0) + d * width : GridPoint(4, 3) + d * width;
  };
  Array x(LMKAN_FLOAT32, shape.x_size());
  for (int64_t r = 0; r < shape.rows; ++r) {
    x.Set(2 * r, feature(r / kSteps));
    x.Set(2 * r + 1, feature(r % kSteps));
  }
  const Reference reference = EvaluateByPair(shape, x.ToDoubles(), table);
  DeviceTable device_table(table, Placement::kHeap);
  for (const lmkan_cuda_tactic tactic : kTactics) {
    if (!Offers(device_table, tactic)) continue;
    ExpectClose(shape, reference, Lookup(device_table, x, tactic),
                Describe(shape, LMKAN_INT8, LMKAN_FLOAT32, tactic) + ", largest integers");
  }
}

// --- Batches
// --------------------------------------------------------------------------------------------

// A row's bits depend neither on the rows around it nor on the device.
void TestBatches(const Shape& shape, lmkan_dtype table_dtype, lmkan_dtype x_dtype) {
  DeviceTable table(MakeTable(shape, table_dtype, 1), Placement::kHeap);
  const Array x = MakeX(shape, x_dtype, 2);
  const int64_t features = 2 * shape.num_pairs;
  const auto x_bytes = features * static_cast<int64_t>(ElementSize(x_dtype));
  const auto y_bytes = shape.num_outputs * static_cast<int64_t>(ElementSize(x_dtype));
  for (const lmkan_cuda_tactic tactic : kTactics) {
    UseDevice(0);
    if (!Offers(table, tactic)) continue;
    const Array whole = Lookup(table, x, tactic);
    for (int device = 0; device < NumDevices(); ++device) {
      if (!Differs(device, tactic)) continue;
      UseDevice(device);
      for (const int64_t rows : {int64_t{7}, int64_t{200}, shape.rows}) {
        const int64_t first = rows == shape.rows ? 0 : (shape.rows - rows) / 2;
        Array part(x_dtype, rows * features);
        std::memcpy(part.data(), x.data() + first * x_bytes, static_cast<size_t>(rows * x_bytes));
        const Array y = Lookup(table, part, tactic);
        LMKAN_EXPECT(IsEqual(y.data(), whole.data() + first * y_bytes, rows * y_bytes),
                     "%s: %d rows alone differ",
                     Describe(shape, table_dtype, x_dtype, tactic).c_str(), static_cast<int>(rows));
      }
    }
  }
}

// --- Features that are not finite
// -----------------------------------------------------------------------

void TestNonfinite(const Shape& shape, lmkan_dtype table_dtype, lmkan_dtype x_dtype,
                   lmkan_cuda_tactic tactic) {
  const std::string label = Describe(shape, table_dtype, x_dtype, tactic);
  const double infinity = std::numeric_limits<double>::infinity();
  for (const bool is_zero : {false, true}) {
    DeviceTable table(is_zero ? Table(shape, table_dtype) : MakeTable(shape, table_dtype, 1),
                      Placement::kHeap);
    if (!Offers(table, tactic)) return;
    const Array x = MakeX(shape, x_dtype, 2);
    const Array y = Lookup(table, x, tactic);
    const int64_t features = 2 * shape.num_pairs;
    const auto row_bytes = shape.num_outputs * static_cast<int64_t>(ElementSize(x_dtype));
    for (int64_t feature = 0; feature < features; ++feature) {
      Array bad_x = x;
      const int64_t bad = feature * 5 % shape.rows;
      const double values[] = {infinity, -infinity, std::nan("")};
      bad_x.Set(bad * features + feature, values[feature % 3]);
      const Array bad_y = Lookup(table, bad_x, tactic);
      for (int64_t r = 0; r < shape.rows; ++r) {
        if (r != bad) {
          LMKAN_EXPECT(
              IsEqual(y.at(r * shape.num_outputs), bad_y.at(r * shape.num_outputs), row_bytes),
              "%s: row %d changes row %d", label.c_str(), static_cast<int>(bad),
              static_cast<int>(r));
          continue;
        }
        for (int64_t o = 0; o < shape.num_outputs; ++o) {
          LMKAN_EXPECT(!std::isfinite(bad_y.Get(r * shape.num_outputs + o)),
                       "%s: feature %d leaves y[%d][%d] finite", label.c_str(),
                       static_cast<int>(feature), static_cast<int>(r), static_cast<int>(o));
        }
      }
    }
  }
}

// --- Memory
// ---------------------------------------------------------------------------------------------

void TestBounds(const Shape& shape, lmkan_dtype table_dtype, lmkan_dtype x_dtype) {
  const Table values = MakeTable(shape, table_dtype, 1);
  Array x = MakeX(shape, x_dtype, 2);
  for (int64_t i = 0; i < x.size(); i += 3) {
    const double wild[] = {std::nan(""), std::numeric_limits<double>::infinity(), -1e30, 1e30};
    x.Set(i, wild[i / 3 % 4]);
  }
  for (const Placement placement : kPlacements) {
    DeviceTable table(values, placement);
    for (int device = 0; device < NumDevices(); ++device) {
      UseDevice(device);
      for (const lmkan_cuda_tactic tactic : kTactics) {
        if (Differs(device, tactic) && Offers(table, tactic)) Lookup(table, x, tactic, placement);
      }
    }
    LMKAN_EXPECT(IsEqual(table.entries.Read().data(), values.entries.data(),
                         static_cast<int64_t>(values.entries.num_bytes())),
                 "the table was written");
  }
}

}  // namespace
}  // namespace lmkan::test

int main(int argc, char** argv) {
  using namespace lmkan::test;
  const bool is_small = argc == 2 && std::strcmp(argv[1], "small") == 0;
  if (const char* reason = WhyNoDevice()) {
    std::printf("skipped: no CUDA device: %s\n", reason);
    return kSkipped;
  }
  TestAllValues();
  UseDevice(0);
  TestLargestIntegers();
  size_t turn = 0;
  for (const lmkan_dtype table_dtype : kTableDtypes) {
    for (const lmkan_dtype x_dtype : kXDtypes) {
      ++turn;
      constexpr Shape kBatchShapes[] = {{9, 5, 40, 300}, {5, 4, 144, 520}, {64, 3, 21, 201}};
      if (x_dtype != LMKAN_BFLOAT16) TestBatches(kBatchShapes[turn % 3], table_dtype, x_dtype);
      constexpr Shape kNarrowShapes[] = {{70, 14, 1, 300}, {40, 8, 4, 201}};
      if (x_dtype == LMKAN_FLOAT32) TestBatches(kNarrowShapes[turn / 3 % 2], table_dtype, x_dtype);
      constexpr Shape kNonfiniteShapes[] = {
          {1, 3, 1, 1}, {5, 8, 33, 5}, {3, 26, 16, 19}, {3, 5, 3, 9}};
      UseDevice(1);
      for (const lmkan_cuda_tactic tactic : kTactics) {
        for (const Shape& shape : kNonfiniteShapes) {
          TestNonfinite(shape, table_dtype, x_dtype, tactic);
        }
      }
      for (const int64_t outputs : {1, 7, 12, 32, 65, 129}) {
        TestBounds({1 + static_cast<int64_t>(turn % 5), 3 + static_cast<int64_t>(turn % 4), outputs,
                    1 + static_cast<int64_t>(turn * 7 % 40)},
                   table_dtype, x_dtype);
      }
    }
  }
  TestRealDevice(is_small);
  return Finish();
}
