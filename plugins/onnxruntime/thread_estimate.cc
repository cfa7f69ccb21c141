#include "thread_estimate.h"

#include <cstddef>

namespace lmkan::ort {
namespace {

// Calls that try all threads: the first ones, then those whose number is a power of two or a
// multiple of kTryAgain.
constexpr uint32_t kFirstCalls = 8;
constexpr uint32_t kTryAgain = 1024;

bool TriesAll(uint32_t call) {
  return call < kFirstCalls || (call & (call - 1)) == 0 || call % kTryAgain == 0;
}

}  // namespace

ThreadEstimate::Size& ThreadEstimate::SizeOf(int64_t evaluations) {
  size_t logarithm = 0;
  for (; evaluations > 1; evaluations /= 2) ++logarithm;
  return sizes_[logarithm];
}

int32_t ThreadEstimate::Threads(int64_t evaluations) {
  Size& size = SizeOf(evaluations);
  const uint32_t call = size.calls.fetch_add(1, std::memory_order_relaxed);
  return TriesAll(call) ? most_ : size.found.load(std::memory_order_relaxed);
}

void ThreadEstimate::Found(int64_t evaluations, int32_t threads) {
  std::atomic<int32_t>& found = SizeOf(evaluations).found;
  int32_t before = found.load(std::memory_order_relaxed);
  while (threads > before &&
         !found.compare_exchange_weak(before, threads, std::memory_order_relaxed)) {
  }
}

}  // namespace lmkan::ort
