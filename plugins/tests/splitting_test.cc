// A row's result is the same, bit for bit, in every batch and for every number of tasks, and the
// tasks of a lookup write every byte of y exactly once.
#include <algorithm>
#include <string>
#include <vector>

#include "array.h"
#include "check.h"
#include "cpu_table.h"
#include "inputs.h"
#include "oracle.h"

namespace lmkan::test {
namespace {

// Looks up the rows in batches of one size (the last one is smaller) and compares with `expected`.
void TestBatches(const Shape& shape, const lmkan_cpu_table* table, const Array& x,
                 const Array& expected, int64_t batch, const std::string& label) {
  Array y(x.dtype(), shape.y_size());
  for (int64_t first = 0; first < shape.rows; first += batch) {
    const int64_t count = std::min(batch, shape.rows - first);
    if (!Lookup(table, x.dtype(), x.at(first * 2 * shape.num_pairs),
                y.at(first * shape.num_outputs), count, 1)) {
      return;
    }
  }
  for (int64_t i = 0; i < y.size(); ++i) {
    if (LMKAN_EXPECT(y.GetBits(i) == expected.GetBits(i),
                     "%s, batches of %lld rows: y[%lld][%lld] is %.9g, not %.9g", label.c_str(),
                     static_cast<long long>(batch), static_cast<long long>(i / shape.num_outputs),
                     static_cast<long long>(i % shape.num_outputs), y.Get(i), expected.Get(i))) {
      continue;
    }
    return;
  }
}

// Runs the tasks, last one first, each into arrays of its own with two fillings that differ in
// every byte: the bytes that keep both were not written.
void TestTasks(const Shape& shape, const lmkan_cpu_table* table, const Array& x,
               const Array& expected, int64_t num_tasks, const std::string& label) {
  constexpr unsigned char kFirst = 0x55;
  constexpr unsigned char kSecond = 0xaa;
  std::vector<int> writers(expected.num_bytes(), 0);
  Array first(x.dtype(), shape.y_size());
  Array second(x.dtype(), shape.y_size());
  for (int64_t task = num_tasks - 1; task >= 0; --task) {
    first.Fill(kFirst);
    second.Fill(kSecond);
    for (Array* y : {&first, &second}) {
      const lmkan_status status = lmkan_cpu_lookup2d(table, x.dtype(), x.data(), y->data(),
                                                     shape.rows, task, num_tasks, nullptr, 0);
      LMKAN_EXPECT(status == LMKAN_OK, "%s: status %d of task %lld of %lld", label.c_str(),
                   static_cast<int>(status), static_cast<long long>(task),
                   static_cast<long long>(num_tasks));
    }
    for (size_t i = 0; i < writers.size(); ++i) {
      if (first.data()[i] == kFirst && second.data()[i] == kSecond) continue;
      ++writers[i];
      const unsigned char byte = expected.data()[i];
      if (!LMKAN_EXPECT(first.data()[i] == byte && second.data()[i] == byte,
                        "%s: task %lld of %lld, byte %zu of y", label.c_str(),
                        static_cast<long long>(task), static_cast<long long>(num_tasks), i)) {
        return;
      }
    }
  }
  const size_t element = ElementSize(x.dtype());
  for (size_t i = 0; i < writers.size(); ++i) {
    const auto index = static_cast<int64_t>(i / element);
    if (!LMKAN_EXPECT(writers[i] == 1, "%s: %d of %lld tasks wrote y[%lld][%lld]", label.c_str(),
                      writers[i], static_cast<long long>(num_tasks),
                      static_cast<long long>(index / shape.num_outputs),
                      static_cast<long long>(index % shape.num_outputs))) {
      return;
    }
  }
}

void TestShape(const Shape& shape, lmkan_isa isa, lmkan_dtype table_dtype, lmkan_dtype x_dtype,
               lmkan_ownership ownership) {
  const std::string label =
      Describe(isa, table_dtype, x_dtype, ownership) + ", " + shape.ToString();
  const Table table = MakeTable(shape, table_dtype, 1);
  const Array x = MakeX(shape, x_dtype, 2);
  const TableHandle handle = CreateTable(table, ownership, isa);
  if (handle == nullptr) return;
  Array expected(x_dtype, shape.y_size());
  if (!Lookup(handle.get(), x_dtype, x.data(), expected.data(), shape.rows, 1)) return;
  for (const int64_t batch : {1, 2, 3, 4, 5, 6, 7, 8, 16, 19, 111, 989}) {
    if (batch < shape.rows) TestBatches(shape, handle.get(), x, expected, batch, label);
  }
  // The number of tasks times the size of y is the work here.
  for (const int64_t num_tasks : {int64_t{1}, int64_t{2}, int64_t{3}, int64_t{7}, int64_t{64},
                                  shape.rows - 1, shape.rows + 5, 3 * shape.rows + 1}) {
    if (num_tasks < 1 || num_tasks * shape.y_size() > 4000000) continue;
    TestTasks(shape, handle.get(), x, expected, num_tasks, label);
  }
}

}  // namespace
}  // namespace lmkan::test

int main(int argc, char** argv) {
  using namespace lmkan::test;
  constexpr Shape kShapes[] = {{1, 40, 1, 1},  {5, 8, 129, 2}, {19, 3, 65, 5},  {4, 13, 64, 6},
                               {3, 4, 111, 7}, {9, 8, 16, 19}, {5, 4, 33, 111}, {2, 8, 17, 1600}};
  return RunForIsa(argc, argv, [&](lmkan_isa isa) {
    for (const Shape& shape : kShapes) {
      for (const lmkan_dtype table_dtype : kTableDtypes) {
        for (const lmkan_dtype x_dtype : kXDtypes) {
          for (const lmkan_ownership ownership : kOwnerships) {
            TestShape(shape, isa, table_dtype, x_dtype, ownership);
          }
        }
      }
    }
  });
}
