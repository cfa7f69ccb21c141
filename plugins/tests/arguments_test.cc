// Every invalid argument gets its status and a message of one line. Values outside of the enums are
// in c_interface_test.c, because in C++ such a value is undefined before it is passed.
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>

#include "check.h"
#include "cpu_table.h"
#include "inputs.h"

namespace lmkan::test {
namespace {

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
constexpr int64_t kLeast = std::numeric_limits<int64_t>::min();

// A message buffer in the middle of bytes that must not change.
class MessageBuffer {
 public:
  MessageBuffer() { std::memset(bytes_, 0x55, sizeof bytes_); }

  char* text() { return bytes_ + kMargin; }

  // Whether it holds one line, terminated in `size` bytes, and nothing else was written.
  bool IsOneLine(size_t size) const {
    const char* text = bytes_ + kMargin;
    const void* end = std::memchr(text, 0, size);
    if (end == nullptr) return false;
    for (size_t i = 0; i < sizeof bytes_; ++i) {
      const bool inside = i >= kMargin && i < kMargin + size;
      if (!inside && bytes_[i] != 0x55) return false;
    }
    return std::strpbrk(text, "\r\n") == nullptr;
  }

 private:
  static constexpr size_t kMargin = 32;
  char bytes_[512 + 2 * kMargin];
};

// Makes the failing call with buffers of every kind. `call` takes the buffer and its size; the
// message must contain `word`, which names the bad value.
template <class Call>
void ExpectFailure(const Call& call, lmkan_status expected, const std::string& word,
                   const char* label) {
  MessageBuffer whole;
  const lmkan_status status = call(whole.text(), size_t{512});
  LMKAN_EXPECT(status == expected, "%s: status %d, not %d", label, static_cast<int>(status),
               static_cast<int>(expected));
  if (status == LMKAN_OK) return;
  if (!LMKAN_EXPECT(whole.IsOneLine(512), "%s", label)) return;
  const std::string text = whole.text();
  LMKAN_EXPECT(text.size() > 10 && text.find(word) != std::string::npos,
               "%s: \"%s\" does not name %s", label, text.c_str(), word.c_str());

  LMKAN_EXPECT(call(nullptr, 0) == expected, "%s without a message", label);
  LMKAN_EXPECT(call(nullptr, 512) == expected, "%s with a null message of size 512", label);
  MessageBuffer none;
  LMKAN_EXPECT(call(none.text(), 0) == expected, "%s with a message of size 0", label);
  LMKAN_EXPECT(none.text()[0] == 0x55, "%s: wrote a message of size 0", label);
  for (const size_t size : {size_t{1}, size_t{2}, size_t{10}, text.size(), text.size() + 1}) {
    MessageBuffer part;
    LMKAN_EXPECT(call(part.text(), size) == expected, "%s, message of size %zu", label, size);
    LMKAN_EXPECT(part.IsOneLine(size) && text.compare(0, size - 1, part.text()) == 0,
                 "%s: message of size %zu", label, size);
  }
}

void TestCreate() {
  const Shape shape = {2, 4, 3, 1};
  const Table floats = MakeTable(shape, LMKAN_FLOAT32, 1);
  const Table integers = MakeTable(shape, LMKAN_INT8, 1);
  const lmkan_table_desc good = {floats.entries.data(), LMKAN_FLOAT32, 2, 4, 3, nullptr};
  const lmkan_table_desc good_int8 = {integers.entries.data(),  LMKAN_INT8, 2, 4, 3,
                                      integers.scales_or_null()};
  const auto expect = [](const lmkan_table_desc* desc, lmkan_status status, const std::string& word,
                         const char* label) {
    for (const lmkan_ownership ownership : kOwnerships) {
      for (const lmkan_isa isa : {LMKAN_ISA_AUTO, LMKAN_ISA_PORTABLE}) {
        const auto call = [=](char* message, size_t size) {
          // A handle that isn't one: it must be gone after the failure.
          auto* table = reinterpret_cast<lmkan_cpu_table*>(uintptr_t{64});
          const lmkan_status found =
              lmkan_cpu_table_create(desc, ownership, isa, &table, message, size);
          LMKAN_EXPECT(found != LMKAN_OK && table == nullptr, "%s: the handle of a failure", label);
          return found;
        };
        ExpectFailure(call, status, word, label);
      }
    }
  };

  expect(nullptr, LMKAN_INVALID_ARGUMENT, "null", "no description");
  lmkan_table_desc desc = good;
  desc.data = nullptr;
  expect(&desc, LMKAN_INVALID_ARGUMENT, "null", "no data");
  for (const int64_t bad : {int64_t{0}, int64_t{-1}, kLeast}) {
    desc = good;
    desc.num_pairs = bad;
    expect(&desc, LMKAN_INVALID_ARGUMENT, std::to_string(bad), "no pairs");
    desc = good;
    desc.num_outputs = bad;
    expect(&desc, LMKAN_INVALID_ARGUMENT, std::to_string(bad), "no outputs");
  }
  // The grids that are too large have more corners than an address has bits, whatever the limit.
  for (const int64_t bad : {int64_t{2}, int64_t{1}, int64_t{0}, int64_t{-1}, kLeast,
                            int64_t{1} << 32, int64_t{1} << 40, kMost - 1, kMost}) {
    desc = good;
    desc.num_grids = bad;
    expect(&desc, LMKAN_INVALID_ARGUMENT, std::to_string(bad), "number of grids");
  }
  // Each fits 64 bits, their product doesn't.
  for (const int64_t bad : {int64_t{1} << 59, int64_t{1} << 61, kMost / 100, kMost - 1, kMost}) {
    desc = good;
    desc.num_pairs = bad;
    expect(&desc, LMKAN_INVALID_ARGUMENT, std::to_string(bad), "too many pairs");
    desc = good;
    desc.num_outputs = bad;
    expect(&desc, LMKAN_INVALID_ARGUMENT, std::to_string(bad), "too many outputs");
  }
  desc = good;
  desc.num_pairs = desc.num_outputs = int64_t{1} << 32;
  expect(&desc, LMKAN_INVALID_ARGUMENT, std::to_string(desc.num_pairs), "pairs times outputs");

  desc = good_int8;
  desc.scales = nullptr;
  expect(&desc, LMKAN_INVALID_ARGUMENT, "without scales", "no scales for INT8");
  for (const lmkan_dtype dtype : kXDtypes) {
    desc = good_int8;
    desc.dtype = dtype;
    expect(&desc, LMKAN_INVALID_ARGUMENT, "with scales", "scales for floats");
  }
  desc = good_int8;
  desc.num_pairs = desc.num_outputs = int64_t{1} << 32;
  expect(&desc, LMKAN_INVALID_ARGUMENT, std::to_string(desc.num_pairs), "too large an INT8 table");

  const auto no_place = [&](char* message, size_t size) {
    return lmkan_cpu_table_create(&good, LMKAN_COPY, LMKAN_ISA_AUTO, nullptr, message, size);
  };
  ExpectFailure(no_place, LMKAN_INVALID_ARGUMENT, "null", "no place for the handle");
}

// More memory than an address space holds, in a size that can be computed.
void TestOutOfMemory() {
  const float data[1] = {};
  for (const lmkan_dtype dtype : kTableDtypes) {
    const float* scales = dtype == LMKAN_INT8 ? data : nullptr;
    const lmkan_table_desc desc = {data, dtype, int64_t{1} << 50, 3, 1, scales};
    const auto call = [&](char* message, size_t size) {
      auto* table = reinterpret_cast<lmkan_cpu_table*>(uintptr_t{64});
      const lmkan_status status =
          lmkan_cpu_table_create(&desc, LMKAN_COPY, LMKAN_ISA_PORTABLE, &table, message, size);
      LMKAN_EXPECT(table == nullptr, "the handle of a failure");
      return status;
    };
    ExpectFailure(call, LMKAN_OUT_OF_MEMORY, "memory", "a table of 2^54 entries");
  }
}

void TestLookup(lmkan_dtype table_dtype) {
  const Shape shape = {2, 4, 3, 2};
  const Table data = MakeTable(shape, table_dtype, 1);
  const Array x = MakeX(shape, LMKAN_FLOAT32, 2);
  Array y(LMKAN_FLOAT32, shape.y_size());
  y.Fill(0x55);
  const Array untouched = y;
  const TableHandle handle = CreateTable(data, LMKAN_COPY, LMKAN_ISA_AUTO);
  if (handle == nullptr) return;
  const auto expect = [&](const lmkan_cpu_table* table, const void* from, void* to, int64_t rows,
                          int64_t task, int64_t num_tasks, const std::string& word,
                          const char* label) {
    const auto call = [&](char* message, size_t size) {
      return lmkan_cpu_lookup2d(table, LMKAN_FLOAT32, from, to, rows, task, num_tasks, message,
                                size);
    };
    ExpectFailure(call, LMKAN_INVALID_ARGUMENT, word, label);
    LMKAN_EXPECT(std::memcmp(y.data(), untouched.data(), y.num_bytes()) == 0, "%s: y was written",
                 label);
    std::memcpy(y.data(), untouched.data(), y.num_bytes());
  };

  expect(nullptr, x.data(), y.data(), 2, 0, 1, "null", "no handle");
  expect(handle.get(), nullptr, y.data(), 2, 0, 1, "null", "no x");
  expect(handle.get(), x.data(), nullptr, 2, 0, 1, "null", "no y");
  for (const int64_t rows : {int64_t{-1}, kLeast}) {
    expect(handle.get(), x.data(), y.data(), rows, 0, 1, std::to_string(rows), "negative rows");
  }
  for (const int64_t num_tasks : {int64_t{0}, int64_t{-1}, kLeast}) {
    expect(handle.get(), x.data(), y.data(), 2, 0, num_tasks, std::to_string(num_tasks),
           "no tasks");
  }
  for (const int64_t task : {int64_t{-1}, kLeast, int64_t{3}, int64_t{4}, kMost}) {
    expect(handle.get(), x.data(), y.data(), 2, task, 3, std::to_string(task), "no such task");
  }
  // With a task a row, the first one stays inside of x and y where this is not refused.
  expect(handle.get(), x.data(), y.data(), kMost, 0, kMost, std::to_string(kMost),
         "more rows than memory can hold");
  const auto int8_x = [&](char* message, size_t size) {
    return lmkan_cpu_lookup2d(handle.get(), LMKAN_INT8, x.data(), y.data(), 2, 0, 1, message, size);
  };
  ExpectFailure(int8_x, LMKAN_INVALID_ARGUMENT, std::to_string(LMKAN_INT8), "x of INT8");
  LMKAN_EXPECT(std::memcmp(y.data(), untouched.data(), y.num_bytes()) == 0, "y was written");
}

void TestNumTasks() {
  const Shape shape = {2, 4, 3, 1};
  const TableHandle handle =
      CreateTable(MakeTable(shape, LMKAN_FLOAT32, 1), LMKAN_COPY, LMKAN_ISA_AUTO);
  if (handle == nullptr) return;
  constexpr int32_t kThreads[] = {std::numeric_limits<int32_t>::min(), -1, 0, 1, 2, 64, 1 << 29,
                                  std::numeric_limits<int32_t>::max()};
  for (const int64_t rows : {kLeast, int64_t{-1}, int64_t{0}, int64_t{1}, int64_t{1000},
                             int64_t{1} << 40, kMost / 6, kMost - 1, kMost}) {
    for (const int32_t threads : kThreads) {
      const lmkan_cpu_table* const tables[] = {handle.get(), nullptr};
      for (const lmkan_cpu_table* table : tables) {
        const int64_t tasks = lmkan_cpu_num_tasks(table, rows, threads);
        LMKAN_EXPECT(tasks >= 1, "%lld tasks for %lld rows on %d threads",
                     static_cast<long long>(tasks), static_cast<long long>(rows), threads);
      }
    }
  }
}

void TestNullHandle() {
  lmkan_cpu_table_destroy(nullptr);
  LMKAN_EXPECT(lmkan_cpu_table_isa(nullptr) != nullptr, "the name of no handle");
}

void TestVersions() {
  LMKAN_EXPECT(lmkan_abi_version() == LMKAN_ABI_VERSION, "%d", lmkan_abi_version());
  LMKAN_EXPECT(std::strcmp(lmkan_version(), LMKAN_VERSION) == 0, "%s", lmkan_version());
}

}  // namespace
}  // namespace lmkan::test

int main() {
  using namespace lmkan::test;
  TestCreate();
  TestOutOfMemory();
  for (const lmkan_dtype table_dtype : kTableDtypes) TestLookup(table_dtype);
  TestNumTasks();
  TestNullHandle();
  TestVersions();
  return Finish();
}
