#include "table.h"

namespace lmkan::test {

Table::Table(const Shape& table_shape, lmkan_dtype dtype)
    : shape(table_shape),
      entries(dtype, shape.table_size()),
      scales(LMKAN_FLOAT32, dtype == LMKAN_INT8 ? shape.num_pairs * shape.num_outputs : 0) {}

const float* Table::scales_or_null() const {
  return scales.size() == 0 ? nullptr : reinterpret_cast<const float*>(scales.data());
}

std::vector<double> Table::ToDoubles() const {
  std::vector<double> values = entries.ToDoubles();
  if (scales.size() == 0) return values;
  const int64_t pair_size = entries.size() / shape.num_pairs;
  for (int64_t i = 0; i < entries.size(); ++i) {
    values[i] *= scales.Get(i / pair_size * shape.num_outputs + i % shape.num_outputs);
  }
  return values;
}

}  // namespace lmkan::test
