// How many threads the ONNX Runtime operator splits its calls for.
#include "thread_estimate.h"

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#include "check.h"

namespace lmkan::test {
namespace {

using ort::ThreadEstimate;

constexpr int32_t kMost = 16;
constexpr int kLearned = 8;  // calls after which it knows

// `calls` calls of a session that has `threads`; how many of them were split for all.
int Calls(ThreadEstimate* estimate, int64_t evaluations, int32_t threads, int calls) {
  int split_for_all = 0;
  for (int i = 0; i < calls; ++i) {
    const int32_t parts = estimate->Threads(evaluations);
    LMKAN_EXPECT(parts >= 1 && parts <= kMost, "%d parts", parts);
    if (parts == kMost) ++split_for_all;
    if (parts > 1) estimate->Found(evaluations, std::min(parts, threads));
  }
  return split_for_all;
}

void TestLearns() {
  for (const int32_t threads : {1, 2, 5, kMost}) {
    ThreadEstimate estimate(kMost);
    LMKAN_EXPECT(Calls(&estimate, 1 << 20, threads, kLearned) == kLearned, "%d threads", threads);
    Calls(&estimate, 1 << 20, threads, 1);  // the eighth after the first tries all
    LMKAN_EXPECT(estimate.Threads(1 << 20) == threads, "%d threads", threads);
  }
}

// It goes on trying, but seldom.
void TestTriesAgain() {
  ThreadEstimate estimate(kMost);
  const int split_for_all = Calls(&estimate, 1 << 20, 1, 100'000);
  LMKAN_EXPECT(split_for_all > 100 && split_for_all < 200, "%d", split_for_all);
  Calls(&estimate, 1 << 20, 4, 2048);
  LMKAN_EXPECT(estimate.Threads(1 << 20) == 4, "threads that were busy before are found later");
  Calls(&estimate, 1 << 20, 2, 2048);
  LMKAN_EXPECT(estimate.Threads(1 << 20) == 4, "and stay known when they are busy again");
}

void TestSizesApart() {
  ThreadEstimate estimate(kMost);
  Calls(&estimate, 100'000, 1, 100);  // done before another thread wakes up
  LMKAN_EXPECT(estimate.Threads(100'000) == 1, "short calls");
  LMKAN_EXPECT(estimate.Threads(100'000'000) == kMost, "long calls");
  for (const int64_t evaluations : {int64_t{0}, int64_t{1}, INT64_MAX}) {
    Calls(&estimate, evaluations, 3, 100);
    LMKAN_EXPECT(estimate.Threads(evaluations) == 3, "%lld", static_cast<long long>(evaluations));
  }
}

void TestCallsAtOnce() {
  ThreadEstimate estimate(kMost);
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] { Calls(&estimate, 1 << 20, 3, 10'000); });
  }
  for (std::thread& caller : callers) caller.join();
  // Call 40,000 is none of those that try all.
  LMKAN_EXPECT(estimate.Threads((1 << 20) + 1) == 3, "of about the same size");
}

}  // namespace
}  // namespace lmkan::test

int main() {
  lmkan::test::TestLearns();
  lmkan::test::TestTriesAgain();
  lmkan::test::TestSizesApart();
  lmkan::test::TestCallsAtOnce();
  return lmkan::test::Finish();
}
