// Memory whose neighbourhood is watched.
//
// A page without access borders the bytes on one side, so that the first access beyond them faults,
// in every build and also from instructions that sanitizers don't see. The other side holds a known
// pattern up to the next such page.
#ifndef LMKAN_TESTS_GUARDED_MEMORY_H_
#define LMKAN_TESTS_GUARDED_MEMORY_H_

#include <cstddef>
#include <vector>

namespace lmkan::test {

enum class Placement {
  kBeforeGuard,  // the bytes end at the page without access
  kAfterGuard,   // the bytes start at it
  kHeap          // an allocation of exactly these bytes, for the address sanitizer
};

inline constexpr Placement kPlacements[] = {Placement::kBeforeGuard, Placement::kAfterGuard,
                                            Placement::kHeap};

const char* Name(Placement placement);

class GuardedMemory {
 public:
  GuardedMemory(Placement placement, size_t num_bytes);
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  unsigned char* data() { return data_; }
  size_t num_bytes() const { return num_bytes_; }

  // From here on writing to the bytes faults (not on the heap).
  void MakeReadOnly();

  // Whether the pattern around the bytes is whole.
  bool PatternIsIntact() const;

 private:
  size_t num_bytes_;
  unsigned char* data_;
  unsigned char* pages_ = nullptr;  // the accessible ones, when not on the heap
  size_t pages_bytes_ = 0;
};

}  // namespace lmkan::test

#endif  // LMKAN_TESTS_GUARDED_MEMORY_H_
