// How many threads a session's calls find, learned from the calls before.
//
// ONNX Runtime tells a custom operator neither how many threads its session has nor how many are
// free. A lookup that is split for more threads than there are reads its table as often as it has
// parts, one after the other.
#ifndef LMKAN_ONNXRUNTIME_THREAD_ESTIMATE_H_
#define LMKAN_ONNXRUNTIME_THREAD_ESTIMATE_H_

#include <array>
#include <atomic>
#include <cstdint>

namespace lmkan::ort {

// Safe to use from several threads at once.
class ThreadEstimate {
 public:
  // `most`: threads of the machine.
  explicit ThreadEstimate(int32_t most) : most_(most) {}

  // Threads to split a call of `evaluations` for: as many as calls of about this size have found,
  // or, in the first calls and now and then later, as many as there may be.
  int32_t Threads(int64_t evaluations);

  // What such a call, split for several, has found.
  void Found(int64_t evaluations, int32_t threads);

 private:
  // Calls apart from those of other sizes: what is done before a sleeping thread wakes up says
  // nothing about longer work.
  struct Size {
    std::atomic<uint32_t> calls{0};
    std::atomic<int32_t> found{1};
  };

  Size& SizeOf(int64_t evaluations);

  int32_t most_;
  std::array<Size, 64> sizes_;  // by the binary logarithm of evaluations
};

}  // namespace lmkan::ort

#endif  // LMKAN_ONNXRUNTIME_THREAD_ESTIMATE_H_
