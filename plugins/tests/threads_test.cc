// Many threads on one handle, and handles made and freed at the same time.
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "array.h"
#include "check.h"
#include "cpu_table.h"
#include "inputs.h"
#include "oracle.h"

namespace lmkan::test {
namespace {

constexpr int kThreads = 8;

template <class Work>
void RunThreads(const Work& work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(work, i);
  for (std::thread& thread : threads) thread.join();
}

// Threads that look up different x with one handle.
void TestSeparateLookups(const Shape& shape, const lmkan_cpu_table* table, lmkan_dtype dtype) {
  std::vector<Array> x;
  std::vector<Array> expected;
  for (int i = 0; i < kThreads; ++i) {
    x.push_back(MakeX(shape, dtype, static_cast<uint64_t>(i)));
    expected.emplace_back(dtype, shape.y_size());
    Lookup(table, dtype, x[i].data(), expected[i].data(), shape.rows, 1);
  }
  RunThreads([&](int i) {
    Array y(dtype, shape.y_size());
    for (int repeat = 0; repeat < 5; ++repeat) {
      y.Fill(0xff);
      Lookup(table, dtype, x[i].data(), y.data(), shape.rows, 1 + repeat);
      LMKAN_EXPECT(std::memcmp(y.data(), expected[i].data(), y.num_bytes()) == 0,
                   "thread %d, repeat %d, x %s", i, repeat, DtypeName(dtype));
    }
  });
}

// Threads that share the tasks of one lookup, as a thread pool does.
void TestSharedLookup(const Shape& shape, const lmkan_cpu_table* table, lmkan_dtype dtype) {
  const Array x = MakeX(shape, dtype, 1);
  Array expected(dtype, shape.y_size());
  Lookup(table, dtype, x.data(), expected.data(), shape.rows, 1);
  for (const int64_t num_tasks :
       {int64_t{2}, int64_t{7}, int64_t{64}, lmkan_cpu_num_tasks(table, shape.rows, kThreads)}) {
    Array y(dtype, shape.y_size());
    y.Fill(0xff);
    std::atomic<int64_t> next{0};
    RunThreads([&](int) {
      for (int64_t task = next++; task < num_tasks; task = next++) {
        const lmkan_status status = lmkan_cpu_lookup2d(table, dtype, x.data(), y.data(), shape.rows,
                                                       task, num_tasks, nullptr, 0);
        LMKAN_EXPECT(status == LMKAN_OK, "task %d", static_cast<int>(task));
      }
    });
    LMKAN_EXPECT(std::memcmp(y.data(), expected.data(), y.num_bytes()) == 0,
                 "%d tasks shared by %d threads, x %s", static_cast<int>(num_tasks), kThreads,
                 DtypeName(dtype));
  }
}

// Threads that make and free their own handles of one table in memory.
void TestSeparateHandles(const Table& table, lmkan_isa isa) {
  const Shape& shape = table.shape;
  const Array x = MakeX(shape, LMKAN_FLOAT32, 1);
  Array expected(LMKAN_FLOAT32, shape.y_size());
  const TableHandle handle = CreateTable(table, LMKAN_COPY, isa);
  if (handle == nullptr) return;
  Lookup(handle.get(), LMKAN_FLOAT32, x.data(), expected.data(), shape.rows, 1);
  RunThreads([&](int i) {
    for (int repeat = 0; repeat < 5; ++repeat) {
      const TableHandle own = CreateTable(table, LMKAN_COPY, isa);
      if (own == nullptr) return;
      Array y(LMKAN_FLOAT32, shape.y_size());
      Lookup(own.get(), LMKAN_FLOAT32, x.data(), y.data(), shape.rows, 1);
      LMKAN_EXPECT(std::memcmp(y.data(), expected.data(), y.num_bytes()) == 0,
                   "thread %d, repeat %d", i, repeat);
    }
  });
}

// Threads that fail at the same time get their own messages.
void TestSeparateMessages(const lmkan_cpu_table* table) {
  RunThreads([&](int i) {
    const int64_t task = 1000 + i;
    for (int repeat = 0; repeat < 100; ++repeat) {
      char message[128] = "";
      lmkan_cpu_lookup2d(table, LMKAN_FLOAT32, nullptr, nullptr, 1, task, 1, message,
                         sizeof message);
      LMKAN_EXPECT(std::strstr(message, std::to_string(task).c_str()) != nullptr,
                   "thread %d got \"%s\"", i, message);
    }
  });
}

}  // namespace
}  // namespace lmkan::test

int main(int argc, char** argv) {
  using namespace lmkan::test;
  return RunForIsa(argc, argv, [](lmkan_isa isa) {
    const Shape shape = {9, 8, 129, 111};
    for (const lmkan_dtype table_dtype : kTableDtypes) {
      const Table table = MakeTable(shape, table_dtype, 1);
      for (const lmkan_ownership ownership : kOwnerships) {
        const TableHandle handle = CreateTable(table, ownership, isa);
        if (handle == nullptr) return;
        for (const lmkan_dtype x_dtype : kXDtypes) {
          TestSeparateLookups(shape, handle.get(), x_dtype);
          TestSharedLookup(shape, handle.get(), x_dtype);
        }
        TestSeparateMessages(handle.get());
      }
      TestSeparateHandles(table, isa);
    }
  });
}
