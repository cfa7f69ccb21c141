// The table of a lookup: its entries and, of an INT8 table, the scales.
#ifndef LMKAN_TESTS_TABLE_H_
#define LMKAN_TESTS_TABLE_H_

#include <vector>

#include "array.h"
#include "lmkan/lookup2d.h"
#include "oracle.h"

namespace lmkan::test {

// The last one is for tables alone.
inline constexpr lmkan_dtype kTableDtypes[] = {LMKAN_FLOAT32, LMKAN_FLOAT16, LMKAN_BFLOAT16,
                                               LMKAN_INT8};

struct Table {
  // Entries of 0, scales of 0.
  Table(const Shape& table_shape, lmkan_dtype dtype);

  lmkan_dtype dtype() const { return entries.dtype(); }

  // Null where the C interface wants that.
  const float* scales_or_null() const;

  // What the entries stand for.
  std::vector<double> ToDoubles() const;

  Shape shape;
  Array entries;  // [num_pairs][num_grids + 1][num_grids + 1][num_outputs]
  Array scales;   // float32, [num_pairs][num_outputs] of an INT8 table; otherwise empty
};

}  // namespace lmkan::test

#endif  // LMKAN_TESTS_TABLE_H_
