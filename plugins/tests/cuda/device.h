// The device that a test runs on: a GPU, or the emulation of one on the CPU.
#ifndef LMKAN_TESTS_CUDA_DEVICE_H_
#define LMKAN_TESTS_CUDA_DEVICE_H_

#include <cstddef>
#include <memory>

#include "array.h"
#include "guarded_memory.h"

namespace lmkan::test {

// Why there is no device to run on; null where there is one.
const char* WhyNoDevice();

// Devices that differ in their multiprocessors and shared memory: several where they are emulated.
int NumDevices();
inline constexpr int kDevicesWithoutAccelerator = 3;  // the first ones
void UseDevice(int index);

// Tests of what emulated devices lack; nothing there. Small ones allocate little and are over soon,
// as compute-sanitizer wants it.
void TestRealDevice(bool is_small);

// A copy of an array in device memory whose neighbourhood is watched: by guard pages where the
// device is emulated, by a pattern on a GPU. The start is aligned to 16 bytes.
class DeviceArray {
 public:
  DeviceArray(const Array& values, Placement placement);
  ~DeviceArray();
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  // Null for an array without elements.
  void* data();

  // What it holds after all launches so far.
  Array Read();

  bool NeighbourhoodIsIntact();

 private:
  struct Memory;
  lmkan_dtype dtype_;
  int64_t size_;
  std::unique_ptr<Memory> memory_;
};

}  // namespace lmkan::test

#endif  // LMKAN_TESTS_CUDA_DEVICE_H_
