#include "guarded_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace lmkan::test {
namespace {

constexpr unsigned char kPattern = 0xc3;

size_t PageBytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

[[noreturn]] void Stop(const char* call) {
  std::perror(call);
  std::exit(1);
}

}  // namespace

const char* Name(Placement placement) {
  switch (placement) {
    case Placement::kBeforeGuard:
      return "before a guard page";
    case Placement::kAfterGuard:
      return "after a guard page";
    default:
      return "on the heap";
  }
}

GuardedMemory::GuardedMemory(Placement placement, size_t num_bytes) : num_bytes_(num_bytes) {
  if (placement == Placement::kHeap) {
    data_ = static_cast<unsigned char*>(std::malloc(num_bytes));
    if (data_ == nullptr && num_bytes != 0) Stop("malloc");
    return;
  }
  const size_t page = PageBytes();
  pages_bytes_ = (num_bytes + page - 1) / page * page;
  void* memory =
      mmap(nullptr, pages_bytes_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) Stop("mmap");
  pages_ = static_cast<unsigned char*>(memory) + page;
  if (mprotect(pages_, pages_bytes_, PROT_READ | PROT_WRITE) != 0) Stop("mprotect");
  std::memset(pages_, kPattern, pages_bytes_);
  data_ = placement == Placement::kAfterGuard ? pages_ : pages_ + pages_bytes_ - num_bytes;
}

GuardedMemory::~GuardedMemory() {
  if (pages_ == nullptr) {
    std::free(data_);
  } else {
    munmap(pages_ - PageBytes(), pages_bytes_ + 2 * PageBytes());
  }
}

void GuardedMemory::MakeReadOnly() {
  if (pages_ != nullptr && mprotect(pages_, pages_bytes_, PROT_READ) != 0) Stop("mprotect");
}

bool GuardedMemory::PatternIsIntact() const {
  for (size_t i = 0; i < pages_bytes_; ++i) {
    const bool outside = pages_ + i < data_ || pages_ + i >= data_ + num_bytes_;
    if (outside && pages_[i] != kPattern) return false;
  }
  return true;
}

}  // namespace lmkan::test
