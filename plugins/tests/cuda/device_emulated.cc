#include <algorithm>
#include <cstring>

#include "device.h"
#include "emulation/cuda_runtime.h"

namespace lmkan::test {

const char* WhyNoDevice() { return nullptr; }

int NumDevices() { return 6; }

void UseDevice(int index) {
  emulation::device = {};
  // Few multiprocessors make large blocks, little shared memory a single stage, and few blocks
  // take turns. The last ones have the tensor memory accelerator, which copies late or early, or
  // which the code was not compiled for.
  emulation::device.num_processors = index == 0 ? 2 : 132;
  emulation::device.shared_per_block = index == 2 ? 99 << 10 : 227 << 10;
  if (index != 1) emulation::device.most_blocks = 3;
  emulation::device.index = index;
  emulation::device.has_accelerator = index >= 3;
  emulation::device.copies_early = index == 4;
  if (index == 5) emulation::device.code = 80;
}

void TestRealDevice(bool) {}

struct DeviceArray::Memory {
  GuardedMemory bytes;
};

DeviceArray::DeviceArray(const Array& values, Placement placement)
    : dtype_(values.dtype()), size_(values.size()) {
  // Whole chunks end where the guard page starts.
  const size_t padding =
      placement == Placement::kBeforeGuard ? (16 - values.num_bytes() % 16) % 16 : 0;
  memory_.reset(new Memory{{placement, values.num_bytes() + padding}});
  if (values.num_bytes() > 0) {
    std::memcpy(memory_->bytes.data(), values.data(), values.num_bytes());
  }
}

DeviceArray::~DeviceArray() = default;

void* DeviceArray::data() { return size_ == 0 ? nullptr : memory_->bytes.data(); }

Array DeviceArray::Read() {
  Array values(dtype_, size_);
  if (size_ > 0) std::memcpy(values.data(), memory_->bytes.data(), values.num_bytes());
  return values;
}

bool DeviceArray::NeighbourhoodIsIntact() { return memory_->bytes.PatternIsIntact(); }

}  // namespace lmkan::test
