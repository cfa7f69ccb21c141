#include "inputs.h"

#include <cmath>

namespace lmkan::test {
namespace {

// Whether the features of a group of pairs are mostly on the grid, around it, or anywhere.
enum class Reach { kGrid, kAround, kAnywhere };

double MakeFeature(int64_t num_grids, lmkan_dtype dtype, Reach reach, Random& random) {
  const double sign = random.Index(2) == 0 ? 1.0 : -1.0;
  const int64_t kind = random.Index(20);
  if (reach != Reach::kAnywhere && kind <= 13) {
    const double end = GridPoint(num_grids, num_grids);
    const double width = end - GridPoint(num_grids, num_grids - 1);
    const double farthest = reach == Reach::kGrid ? kFarthestFit : kFarthestCoarseFit;
    const double limit = end + width * (farthest - 0.53);
    if (kind < 13) return random.Uniform(-limit, limit);
    return sign * (limit + width * random.Uniform(0, 0.06));
  }
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

double MakeScale(Random& random) {
  const double scale = random.Uniform(0.005, 0.02) * (random.Index(4) == 0 ? -1 : 1);
  const int64_t kind = random.Index(64);
  if (kind == 0) return 0;
  if (kind == 1) return scale * 0x1p-120;
  if (kind == 2) return scale * 0x1p90;
  return scale;
}

}  // namespace

Table MakeTable(const Shape& shape, lmkan_dtype dtype, uint64_t seed) {
  Random random(seed);
  Table table(shape, dtype);
  for (int64_t i = 0; i < table.scales.size(); ++i) table.scales.Set(i, MakeScale(random));
  for (int64_t i = 0; i < table.entries.size(); ++i) {
    if (dtype == LMKAN_INT8) {
      table.entries.Set(i, static_cast<double>(random.Index(256) - 128));
      continue;
    }
    double entry = random.Uniform(-1, 1);
    if (random.Index(32) == 0) {
      entry = SmallestSubnormal(dtype) * static_cast<double>(random.Index(7) - 3);
    }
    table.entries.Set(i, entry);
  }
  return table;
}

Array MakeX(const Shape& shape, lmkan_dtype dtype, uint64_t seed) {
  Random random(seed);
  Array x(dtype, shape.x_size());
  Reach reach = Reach::kGrid;
  for (int64_t i = 0; i < x.size(); ++i) {
    if (i % (2 * shape.num_pairs) % (2 * kGroupPairs) == 0) {
      reach = static_cast<Reach>(random.Index(3));
    }
    x.Set(i, MakeFeature(shape.num_grids, dtype, reach, random));
  }
  return x;
}

}  // namespace lmkan::test
