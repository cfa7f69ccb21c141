// The oracle of the other tests, against what operator.md says in so many words.
#include "oracle.h"

#include <cmath>

#include "check.h"
#include "inputs.h"

namespace lmkan::test {
namespace {

// G = 4 has σ⁻¹ of 1/4, 1/2 and 3/4 inside: -ln 2, 0, ln 2.
void TestGridOfFourCells() {
  const double ln2 = 0.69314718055994530942;
  for (int i = 0; i <= 4; ++i) {
    const double point = GridPoint(4, i);
    LMKAN_EXPECT(std::fabs(point - (i - 2) * ln2) < 1e-15, "point %d is %.17g", i, point);
  }
}

// With G = 3 the ghost points mirror 2 ln(2/3) outwards.
void TestGridOfThreeCells() {
  const double inner = std::log(1.5);
  const double expected[4] = {-3 * inner, -inner, inner, 3 * inner};
  for (int i = 0; i <= 3; ++i) {
    const double point = GridPoint(3, i);
    LMKAN_EXPECT(std::fabs(point - expected[i]) < 1e-15, "point %d is %.17g", i, point);
  }
}

// On the grid f is the table; the first feature of a pair is the table's first axis.
void TestTableIsReproducedOnTheGrid() {
  const Shape shape = {2, 5, 3, 1};
  const int64_t axis = shape.num_grids + 1;
  std::vector<double> table(shape.table_size(), 0.0);
  for (int64_t i = 0; i < axis * axis * shape.num_outputs; ++i) table[i] = static_cast<double>(i);
  for (int64_t i1 = 0; i1 < axis; ++i1) {
    for (int64_t i2 = 0; i2 < axis; ++i2) {
      const std::vector<double> x = {GridPoint(5, i1), GridPoint(5, i2), 0.3, -7.0};
      const Reference reference = Evaluate(shape, x, table);
      for (int64_t o = 0; o < shape.num_outputs; ++o) {
        const auto expected = static_cast<double>((i1 * axis + i2) * shape.num_outputs + o);
        LMKAN_EXPECT(std::fabs(reference.y[o] - expected) < 1e-12, "y[%d] at (%d, %d) is %.17g",
                     static_cast<int>(o), static_cast<int>(i1), static_cast<int>(i2),
                     reference.y[o]);
      }
    }
  }
}

// a + b x1 + c x2 + d x1 x2 is bilinear in every cell, so it is exact, tails included.
void TestBilinearFunctionsAreExact() {
  for (const int64_t num_grids : {3, 4, 8, 13, 40}) {
    const Shape shape = {1, num_grids, 1, 1};
    std::vector<double> table;
    for (int64_t i1 = 0; i1 <= num_grids; ++i1) {
      for (int64_t i2 = 0; i2 <= num_grids; ++i2) {
        const double x1 = GridPoint(num_grids, i1);
        const double x2 = GridPoint(num_grids, i2);
        table.push_back(0.5 - 2 * x1 + 3 * x2 + 0.25 * x1 * x2);
      }
    }
    Random random(1);
    for (int i = 0; i < 200; ++i) {
      const double reach = i % 2 == 0 ? 3 : 180;
      const double x1 = random.Uniform(-reach, reach);
      const double x2 = random.Uniform(-reach, reach);
      const double y = Evaluate(shape, {x1, x2}, table).y[0];
      const double expected = 0.5 - 2 * x1 + 3 * x2 + 0.25 * x1 * x2;
      LMKAN_EXPECT(std::fabs(y - expected) < 1e-8, "G %d, (%g, %g) gives %.17g, not %.17g",
                   static_cast<int>(num_grids), x1, x2, y, expected);
    }
  }
}

// The bound must be small, or comparisons with it say nothing.
void TestBoundIsTight() {
  const Shape shape = {19, 40, 1, 200};
  Random random(2);
  std::vector<double> x(shape.x_size());
  for (double& feature : x) feature = random.Uniform(-3, 3);
  const std::vector<double> table(shape.table_size(), 1.0);
  const Reference reference = Evaluate(shape, x, table);
  for (int64_t r = 0; r < shape.rows; ++r) {
    LMKAN_EXPECT(std::fabs(reference.y[r] - 19) < 1e-12, "row %d of a constant gives %.17g",
                 static_cast<int>(r), reference.y[r]);
    LMKAN_EXPECT(reference.bound[r] < 19 * 5e-4, "row %d has the bound %g", static_cast<int>(r),
                 reference.bound[r]);
  }
}

// What rounded weights add to the bound of a table of ones: 2^-15 for each corner of the groups
// whose features are all near their cells, 2^-12 where they are not much farther, and nothing for
// the others.
void TestRoundedWeights() {
  const Shape shape = {6, 8, 1, 9};
  const std::vector<double> table(shape.table_size(), 1.0);
  std::vector<double> x(shape.x_size(), 0.1);
  const double end = GridPoint(8, 8);
  const double width = end - GridPoint(8, 7);
  const auto feature = [&](int64_t row, int64_t index) -> double& { return x[row * 12 + index]; };
  feature(1, 7) = end + 0.42 * width;
  feature(2, 8) = -end - 0.42 * width;
  feature(3, 0) = 180;
  feature(3, 11) = -180;
  feature(4, 0) = end + 0.4 * width;
  feature(5, 11) = -end - 0.4 * width;
  feature(6, 7) = end + 3.0 * width;
  feature(7, 8) = -end - 2.98 * width;
  feature(8, 8) = std::nan("");
  const int units[] = {6, 4 * 8 + 2, 4 + 2 * 8, 0, 6, 6, 2, 4 + 2 * 8};
  const Reference exact = Evaluate(shape, x, table);
  const Reference rounded = Evaluate(shape, x, table, LMKAN_INT8);
  for (int r = 0; r < 8; ++r) {
    const double added = rounded.bound[r] - exact.bound[r];
    LMKAN_EXPECT(std::fabs(added - 1.1 * units[r] * 4 * 0x1p-15) < 1e-12, "row %d adds %g", r,
                 added);
    LMKAN_EXPECT(rounded.y[r] == exact.y[r], "row %d", r);
  }
  LMKAN_EXPECT(std::isnan(rounded.y[8]), "NaN gives %g", rounded.y[8]);
}

// The features of the other tests must have groups of all three kinds, in any order.
void TestFeaturesMixGroups() {
  const Shape shape = {8, 8, 1, 100};
  const std::vector<double> table(shape.table_size(), 1.0);
  for (const lmkan_dtype dtype : kXDtypes) {
    const std::vector<double> x = MakeX(shape, dtype, 1).ToDoubles();
    const Reference exact = Evaluate(shape, x, table);
    const Reference rounded = Evaluate(shape, x, table, LMKAN_INT8);
    int rows[17] = {};  // by what the two groups of a row add: 0, 1 or 8 each
    for (int64_t r = 0; r < shape.rows; ++r) {
      const double added = (rounded.bound[r] - exact.bound[r]) / (1.1 * kGroupPairs * 4 * 0x1p-15);
      ++rows[std::lround(added)];
    }
    for (const int added : {0, 1, 2, 8, 9, 16}) {
      LMKAN_EXPECT(rows[added] >= 4, "%s: %d rows add %d", DtypeName(dtype), rows[added], added);
    }
  }
}

}  // namespace
}  // namespace lmkan::test

int main() {
  using namespace lmkan::test;
  TestGridOfFourCells();
  TestGridOfThreeCells();
  TestTableIsReproducedOnTheGrid();
  TestBilinearFunctionsAreExact();
  TestBoundIsTight();
  TestRoundedWeights();
  TestFeaturesMixGroups();
  return Finish();
}
