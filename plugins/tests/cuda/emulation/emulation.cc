#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#include "cuda_pipeline_primitives.h"
#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace lmkan::cuda {

// What the kernels declare as their dynamic shared memory.
alignas(128) uint4 shared_memory[(256 << 10) / sizeof(uint4)];

}  // namespace lmkan::cuda

namespace emulation {

Device device;
cudaError_t last_error = cudaSuccess;
int64_t num_launches = 0;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kDefaultSharedLimit = 48 << 10;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> started;
  std::vector<std::vector<Copy>> committed;
  bool is_done = false;
  void* fake_stack = nullptr;  // the address sanitizer's
};

std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* current = nullptr;
ucontext_t scheduler;
const std::function<void()>* thread_function = nullptr;
std::map<const void*, int> shared_limits;

[[noreturn]] void Stop(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

// The address sanitizer wants to know of every change of stacks.
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;

void BeforeFiber(Fiber* fiber) {
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber->stack.get(), kStackBytes);
}
void InFiber() {
  __sanitizer_finish_switch_fiber(current->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}
void BeforeScheduler(Fiber* fiber) {
  __sanitizer_start_switch_fiber(&fiber->fake_stack, scheduler_stack, scheduler_stack_bytes);
}
void InScheduler() { __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr); }
#else
void BeforeFiber(Fiber*) {}
void InFiber() {}
void BeforeScheduler(Fiber*) {}
void InScheduler() {}
#endif

void LeaveFiber() {
  Fiber* const fiber = current;
  BeforeScheduler(fiber);
  swapcontext(&fiber->context, &scheduler);
  InFiber();
}

// A fiber serves one thread after the other.
void FiberMain() {
  InFiber();
  for (;;) {
    (*thread_function)();
    if (!current->started.empty() || !current->committed.empty()) {
      Stop("a thread ended before its copies did");
    }
    current->is_done = true;
    LeaveFiber();
  }
}

void Resume(Fiber* fiber, unsigned int thread) {
  threadIdx = dim3(thread);
  current = fiber;
  BeforeFiber(fiber);
  swapcontext(&scheduler, &fiber->context);
  InScheduler();
}

void MakeFibers(size_t count) {
  while (fibers.size() < count) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = std::make_unique<char[]>(kStackBytes);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStackBytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, FiberMain, 0);
    fibers.push_back(std::move(fiber));
  }
}

void RunBlock(unsigned int threads) {
  for (unsigned int t = 0; t < threads; ++t) fibers[t]->is_done = false;
  for (int phase = 0;; ++phase) {
    for (unsigned int i = 0; i < threads; ++i) {
      const unsigned int t = phase % 2 == 0 ? i : threads - 1 - i;
      Resume(fibers[t].get(), t);
    }
    for (unsigned int t = 1; t < threads; ++t) {
      if (fibers[t]->is_done != fibers[0]->is_done) Stop("a barrier that not all threads reach");
    }
    if (fibers[0]->is_done) return;
  }
}

// Shared memory starts with garbage, NaN in every type, and ends where the launch said.
void PrepareSharedMemory(size_t bytes) {
  using lmkan::cuda::shared_memory;
  char* const memory = reinterpret_cast<char*>(shared_memory);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(memory, bytes);
  ASAN_POISON_MEMORY_REGION(memory + bytes, sizeof shared_memory - bytes);
#endif
  std::memset(memory, 0xff, bytes);
}

}  // namespace

cudaError_t SetSharedLimit(const void* kernel, int bytes) {
  if (bytes > device.shared_per_block) return last_error = cudaErrorInvalidValue;
  shared_limits[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t Run(const void* kernel, const cudaLaunchConfig_t& config,
                const std::function<void()>& thread) {
  const int limit = shared_limits.count(kernel) != 0 ? shared_limits[kernel] : kDefaultSharedLimit;
  if (device.launch_error != cudaSuccess) return last_error = device.launch_error;
  if (config.gridDim.x == 0 || config.gridDim.x > INT32_MAX || config.blockDim.x == 0 ||
      config.blockDim.x > 1024 || config.dynamicSmemBytes > static_cast<size_t>(limit)) {
    return last_error = cudaErrorInvalidConfiguration;
  }
  ++num_launches;
  gridDim = std::min(config.gridDim.x, device.most_blocks);
  blockDim = config.blockDim;
  thread_function = &thread;
  MakeFibers(blockDim.x);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
    PrepareSharedMemory(config.dynamicSmemBytes);
    RunBlock(blockDim.x);
  }
  return cudaSuccess;
}

}  // namespace emulation

void __syncthreads() {
  const unsigned int thread = threadIdx.x;
  emulation::LeaveFiber();
  if (threadIdx.x != thread) emulation::Stop("a fiber runs as another thread");
}

void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) emulation::Stop("a copy of a wrong size");
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 ||
      reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    emulation::Stop("a misaligned copy");
  }
  emulation::current->started.push_back({to, from, bytes});
}

void __pipeline_commit() {
  emulation::Fiber& fiber = *emulation::current;
  fiber.committed.push_back(std::move(fiber.started));
  fiber.started.clear();
}

void __pipeline_wait_prior(size_t batches) {
  auto& committed = emulation::current->committed;
  while (committed.size() > batches) {
    for (const emulation::Copy& copy : committed.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    committed.erase(committed.begin());
  }
}

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  if (emulation::device.error != cudaSuccess) emulation::last_error = emulation::device.error;
  return emulation::device.error;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulation::device.num_processors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 8;  // without the tensor memory accelerator, which is not emulated
      break;
    default:
      *value = emulation::device.shared_per_block;
  }
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    default:
      return "an error of the emulation";
  }
}

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInsufficientDriver ? "cudaErrorInsufficientDriver"
                                              : "cudaErrorOfTheEmulation";
}
