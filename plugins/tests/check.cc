#include "check.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

namespace lmkan::test {
namespace {

// One broken kernel fails thousands of checks; the first ones say enough.
constexpr int kMostPrinted = 20;

std::atomic<long> passes{0};
std::atomic<int> failures{0};

}  // namespace

void Pass() { passes.fetch_add(1, std::memory_order_relaxed); }

void Fail(const char* file, int line, const char* condition, const char* format, ...) {
  const int previous = failures.fetch_add(1);
  if (previous == kMostPrinted) std::fprintf(stderr, "more failures are not printed\n");
  if (previous >= kMostPrinted) return;
  char text[512];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  std::fprintf(stderr, "%s:%d: expected %s: %s\n", file, line, condition, text);
}

int Finish() {
  const long checks = passes + failures;
  if (checks == 0) {
    std::fprintf(stderr, "nothing was checked\n");
    return 1;
  }
  std::printf("%ld checks, %d failures\n", checks, failures.load());
  return failures == 0 ? 0 : 1;
}

}  // namespace lmkan::test
