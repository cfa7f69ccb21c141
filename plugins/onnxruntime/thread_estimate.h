// How many threads a session's calls find, learned from the calls before.
//
// ONNX Runtime tells a custom operator neither how many threads its session has nor how many are
// free. A lookup of many rows that is split for more threads than there are reads its table once
// for each part, one after the other.
#ifndef LMKAN_ONNXRUNTIME_THREAD_ESTIMATE_H_
#define LMKAN_ONNXRUNTIME_THREAD_ESTIMATE_H_

#include <array>
#include <atomic>
#include <cstdint>

namespace lmkan::ort {

// Counts the threads that work on one call. A thread that turned to another call in between would
// count again; ONNX Runtime's finish one first.
class CallThreads {
 public:
  CallThreads();

  // Called by every thread, as often as it likes.
  void CountMe();

  int32_t count() const { return count_.load(std::memory_order_relaxed); }

 private:
  uint64_t id_;  // no other call has it
  std::atomic<int32_t> count_{0};
};

// Safe to use from several threads at once.
class ThreadEstimate {
 public:
  // `most`: threads of the machine.
  explicit ThreadEstimate(int32_t most) : most_(most) {}

  // Threads to split a call of `evaluations` for: as many as calls of about this size have found,
  // or, to find more, all in the first calls and twice as many in a few later ones.
  int32_t Threads(int64_t evaluations);

  // What such a call, split for several, has found.
  void Record(int64_t evaluations, int32_t threads);

 private:
  // Calls apart from those of other sizes: what is done before a sleeping thread wakes up says
  // nothing about longer work.
  struct Bucket {
    std::atomic<uint32_t> calls{0};
    std::atomic<int32_t> found{1};
  };

  Bucket& BucketOf(int64_t evaluations);

  int32_t most_;
  std::array<Bucket, 64> buckets_;  // by the binary logarithm of evaluations
};

}  // namespace lmkan::ort

#endif  // LMKAN_ONNXRUNTIME_THREAD_ESTIMATE_H_
