#include "inputs.h"

#include <cmath>

namespace lmkan::test {
namespace {

double MakeFeature(int64_t num_grids, lmkan_dtype dtype, Random& random) {
  const double sign = random.Index(2) == 0 ? 1.0 : -1.0;
  const int64_t kind = random.Index(20);
  if (kind < 10) return random.Uniform(-3, 3);
  if (kind < 13) return random.Uniform(-180, 180);
  if (kind == 13) return sign * 180;
  if (kind == 14) return sign * 0.0;
  if (kind == 15) {
    return sign * SmallestSubnormal(dtype) * static_cast<double>(1 + random.Index(100));
  }
  const double point = Round(dtype, GridPoint(num_grids, random.Index(num_grids + 1)));
  if (kind < 18) return point;
  return point * (1 + sign * std::ldexp(1.0, 1 - Precision(dtype)));
}

}  // namespace

Array MakeTable(const Shape& shape, lmkan_dtype dtype, uint64_t seed) {
  Random random(seed);
  Array table(dtype, shape.table_size());
  for (int64_t i = 0; i < table.size(); ++i) {
    double entry = random.Uniform(-1, 1);
    if (random.Index(32) == 0) {
      entry = SmallestSubnormal(dtype) * static_cast<double>(random.Index(7) - 3);
    }
    table.Set(i, entry);
  }
  return table;
}

Array MakeX(const Shape& shape, lmkan_dtype dtype, uint64_t seed) {
  Random random(seed);
  Array x(dtype, shape.x_size());
  for (int64_t i = 0; i < x.size(); ++i) x.Set(i, MakeFeature(shape.num_grids, dtype, random));
  return x;
}

}  // namespace lmkan::test
