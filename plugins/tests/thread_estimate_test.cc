// How many threads the ONNX Runtime operator splits its calls for.
#include "thread_estimate.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "check.h"

namespace lmkan::test {
namespace {

using ort::CallThreads;
using ort::ThreadEstimate;

constexpr int32_t kMost = 16;
constexpr int kFirstCalls = 8;

// `calls` calls of a session that has `threads`; how many were split for as many or fewer.
int Calls(ThreadEstimate* estimate, int64_t evaluations, int32_t threads, int calls) {
  int fit = 0;
  for (int i = 0; i < calls; ++i) {
    const int32_t parts = estimate->Threads(evaluations);
    LMKAN_EXPECT(parts >= 1 && parts <= kMost, "%d parts", parts);
    if (parts <= threads) ++fit;
    if (parts > 1) estimate->Record(evaluations, std::min(parts, threads));
  }
  return fit;
}

void TestLearns() {
  for (const int32_t threads : {1, 2, 5, kMost - 1}) {
    ThreadEstimate estimate(kMost);
    LMKAN_EXPECT(Calls(&estimate, 1 << 20, threads, kFirstCalls) == 0, "%d threads", threads);
    LMKAN_EXPECT(Calls(&estimate, 1 << 20, threads, 100) == 100, "%d threads", threads);
    LMKAN_EXPECT(estimate.Threads(1 << 20) == threads, "%d threads", threads);
  }
}

// It goes on looking for more threads, but seldom.
void TestTriesAgain() {
  ThreadEstimate estimate(kMost);
  const int fit = Calls(&estimate, 1 << 20, 1, 100'000);
  LMKAN_EXPECT(fit > 99'000 && fit < 99'500, "%d", fit);
  Calls(&estimate, 1 << 20, kMost, 1000);
  LMKAN_EXPECT(estimate.Threads(1 << 20) == kMost, "threads that were busy are found later");
  Calls(&estimate, 1 << 20, 2, 1000);
  LMKAN_EXPECT(estimate.Threads(1 << 20) == kMost, "and stay known when they are busy again");
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

void TestMoreThanTheMachineHas() {
  ThreadEstimate estimate(kMost);
  Calls(&estimate, 1 << 20, 1, kFirstCalls);
  estimate.Record(1 << 20, 5 * kMost);
  LMKAN_EXPECT(estimate.Threads(1 << 20) == kMost, "not more");
}

template <class Work>
void RunThreads(int threads, const Work& work) {
  std::vector<std::thread> running;
  for (int i = 0; i < threads; ++i) running.emplace_back(work, i);
  for (std::thread& thread : running) thread.join();
}

// Sessions whose calls come at once and find different numbers: the largest counts, and all calls.
void TestCallsAtOnce() {
  ThreadEstimate together(kMost);
  std::atomic<int> fit{0};
  RunThreads(4, [&](int i) {
    Calls(&together, 1 << 20, 1 + i, 10'000);
    fit += Calls(&together, 1 << 20, kMost / 2, 10'000);
  });
  LMKAN_EXPECT(fit > 39'000, "%d", fit.load());
  ThreadEstimate maximum(kMost);
  RunThreads(4, [&](int i) {
    for (int repeat = 0; repeat < 10'000; ++repeat) maximum.Record(1 << 20, 1 + i);
  });
  Calls(&maximum, 1 << 20, 1, kFirstCalls);
  LMKAN_EXPECT(maximum.Threads(1 << 20) == 4, "%d", maximum.Threads(1 << 20));
}

void TestCounting() {
  for (const int threads : {1, 2, 7}) {
    CallThreads one, other;
    RunThreads(threads, [&](int i) {
      for (int repeat = 0; repeat < 100; ++repeat) one.CountMe();
      if (i == 0) other.CountMe();
    });
    LMKAN_EXPECT(one.count() == threads && other.count() == 1, "%d and %d of %d", one.count(),
                 other.count(), threads);
  }
  for (int call = 0; call < 100; ++call) {
    CallThreads again;  // at the same address
    again.CountMe();
    LMKAN_EXPECT(again.count() == 1, "call %d", call);
  }
}

}  // namespace
}  // namespace lmkan::test

int main() {
  lmkan::test::TestLearns();
  lmkan::test::TestTriesAgain();
  lmkan::test::TestSizesApart();
  lmkan::test::TestMoreThanTheMachineHas();
  lmkan::test::TestCallsAtOnce();
  lmkan::test::TestCounting();
  return lmkan::test::Finish();
}
