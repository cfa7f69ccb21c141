#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "device.h"

namespace lmkan::test {
namespace {

constexpr size_t kMargin = 4096;
constexpr unsigned char kPattern = 0xff;  // NaN in every type

void Check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", call, cudaGetErrorString(error));
  std::exit(1);
}

}  // namespace

const char* WhyNoDevice() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int NumDevices() { return 1; }
void UseDevice(int) {}

struct DeviceArray::Memory {
  unsigned char* all = nullptr;  // the values between two margins
  size_t num_bytes = 0;
};

DeviceArray::DeviceArray(const Array& values, Placement)
    : dtype_(values.dtype()), size_(values.size()), memory_(new Memory) {
  memory_->num_bytes = values.num_bytes();
  const size_t all_bytes = memory_->num_bytes + 2 * kMargin;
  Check(cudaMalloc(&memory_->all, all_bytes), "cudaMalloc");
  Check(cudaMemset(memory_->all, kPattern, all_bytes), "cudaMemset");
  Check(
      cudaMemcpy(memory_->all + kMargin, values.data(), memory_->num_bytes, cudaMemcpyHostToDevice),
      "cudaMemcpy");
}

DeviceArray::~DeviceArray() { cudaFree(memory_->all); }

void* DeviceArray::data() { return size_ == 0 ? nullptr : memory_->all + kMargin; }

Array DeviceArray::Read() {
  Array values(dtype_, size_);
  Check(
      cudaMemcpy(values.data(), memory_->all + kMargin, memory_->num_bytes, cudaMemcpyDeviceToHost),
      "cudaMemcpy");
  return values;
}

bool DeviceArray::NeighbourhoodIsIntact() {
  std::vector<unsigned char> margins(2 * kMargin);
  Check(cudaMemcpy(margins.data(), memory_->all, kMargin, cudaMemcpyDeviceToHost), "cudaMemcpy");
  Check(cudaMemcpy(margins.data() + kMargin, memory_->all + kMargin + memory_->num_bytes, kMargin,
                   cudaMemcpyDeviceToHost),
        "cudaMemcpy");
  return std::all_of(margins.begin(), margins.end(),
                     [](unsigned char byte) { return byte == kPattern; });
}

}  // namespace lmkan::test
