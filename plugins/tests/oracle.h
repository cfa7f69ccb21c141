// The operator in float64, written from its definition (docs/operator.md) and not from the kernels.
#ifndef LMKAN_TESTS_ORACLE_H_
#define LMKAN_TESTS_ORACLE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "array.h"

namespace lmkan::test {

struct Shape {
  int64_t num_pairs;
  int64_t num_grids;
  int64_t num_outputs;
  int64_t rows;

  int64_t x_size() const { return rows * 2 * num_pairs; }
  int64_t y_size() const { return rows * num_outputs; }
  int64_t table_size() const { return num_pairs * (num_grids + 1) * (num_grids + 1) * num_outputs; }
  std::string ToString() const;
};

// Point `index` of the grid of G cells, 0 ... G.
double GridPoint(int64_t num_grids, int64_t index);

// Lookups in INT8 tables may round the corner weights to multiples of 2^-14 in a group of
// kGroupPairs neighbouring pairs, the first one of which is a multiple of kGroupPairs, if every
// feature of the group lies within kFarthestFit cells of its cell's centre, and to multiples of
// 2^-11 if every one lies within kFarthestCoarseFit.
inline constexpr int64_t kGroupPairs = 4;
inline constexpr double kFarthestFit = 0.91;
inline constexpr double kFarthestCoarseFit = 3.49;

// y, and how far an evaluation with float32, or with rounded weights, may be from it before it is
// rounded to y's type. Rows with a non-finite feature hold NaN.
struct Reference {
  std::vector<double> y;      // [rows][num_outputs]
  std::vector<double> bound;  // [rows][num_outputs]
};

// `table` holds what the entries of a table of type `table_dtype` stand for.
Reference Evaluate(const Shape& shape, const std::vector<double>& x,
                   const std::vector<double>& table, lmkan_dtype table_dtype = LMKAN_FLOAT32);

// Checks y against the reference and reports the first coordinate that is out of bounds. `label`
// says which case it is. Rows with a non-finite feature must be non-finite.
void ExpectClose(const Shape& shape, const Reference& reference, const Array& y,
                 const std::string& label);

}  // namespace lmkan::test

#endif  // LMKAN_TESTS_ORACLE_H_
