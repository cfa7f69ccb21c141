#include "thread_estimate.h"

#include <algorithm>
#include <cstddef>

namespace lmkan::ort {
namespace {

constexpr uint32_t kFirstCalls = 8;

// One call of so many tries more threads: less than one in a hundred, so that a session without
// them keeps its 99th percentile; a prime, so that no period of the load hides them.
constexpr uint32_t kTryEvery = 127;

}  // namespace

CallThreads::CallThreads() {
  static std::atomic<uint64_t> calls{0};
  id_ = calls.fetch_add(1, std::memory_order_relaxed) + 1;
}

void CallThreads::CountMe() {
  thread_local uint64_t last_call = 0;
  if (last_call == id_) return;
  last_call = id_;
  count_.fetch_add(1, std::memory_order_relaxed);
}

ThreadEstimate::Bucket& ThreadEstimate::BucketOf(int64_t evaluations) {
  size_t logarithm = 0;
  for (; evaluations > 1; evaluations /= 2) ++logarithm;
  return buckets_[logarithm];
}

int32_t ThreadEstimate::Threads(int64_t evaluations) {
  Bucket& bucket = BucketOf(evaluations);
  const uint32_t call = bucket.calls.fetch_add(1, std::memory_order_relaxed);
  if (call < kFirstCalls) return most_;
  const int32_t found = bucket.found.load(std::memory_order_relaxed);
  return call % kTryEvery == 0 ? std::min(most_, 2 * found) : found;
}

void ThreadEstimate::Record(int64_t evaluations, int32_t threads) {
  threads = std::min(threads, most_);
  std::atomic<int32_t>& found = BucketOf(evaluations).found;
  int32_t before = found.load(std::memory_order_relaxed);
  while (threads > before &&
         !found.compare_exchange_weak(before, threads, std::memory_order_relaxed)) {
  }
}

}  // namespace lmkan::ort
