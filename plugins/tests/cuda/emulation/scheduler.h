// How fibers wait for each other.
#ifndef LMKAN_TESTS_CUDA_EMULATION_SCHEDULER_H_
#define LMKAN_TESTS_CUDA_EMULATION_SCHEDULER_H_

#include <cstddef>
#include <vector>

namespace emulation {

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

void Do(const std::vector<Copy>& copies);

// Copies that the running thread has started and not committed; they are no longer its own.
std::vector<Copy> TakeStartedCopies();

// Lets other threads run; the caller looks whether it may go on when they have.
void LetOthersRun();

// Something happened that threads may wait for. Many rounds of all threads without it end the
// program.
void NoteProgress();

[[noreturn]] void Stop(const char* what);

// At the start of a block.
void ForgetBarriers();

}  // namespace emulation

#endif  // LMKAN_TESTS_CUDA_EMULATION_SCHEDULER_H_
