#include <ucontext.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "cuda.h"
#include "cuda_pipeline_primitives.h"
#include "cuda_runtime.h"
#include "scheduler.h"

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

// Twice what the kernels need with the address sanitizer, which clears its notes of a stack at each
// change.
constexpr size_t kStackBytes = 32 << 10;
constexpr int kDefaultSharedLimit = 48 << 10;

constexpr unsigned int kMostThreads = 1024;

enum class State { kRunning, kAtBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> started;
  std::vector<std::vector<Copy>> committed;
  void* fake_stack = nullptr;  // the address sanitizer's
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::array<State, kMostThreads> states;  // of the block's threads
Fiber* current = nullptr;
ucontext_t scheduler;
const std::function<void()>* thread_function = nullptr;
std::map<const void*, int> shared_limits;
bool has_progress = false;

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
    states[threadIdx.x] = State::kDone;
    LeaveFiber();
  }
}

void Resume(Fiber* fiber, unsigned int thread) {
  threadIdx = dim3(thread);
  current = fiber;
  BeforeFiber(fiber);
  swapcontext(&scheduler, &fiber->context);
  InScheduler();
  if (fiber->stack[0] != 0) Stop("a thread needs more stack");
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

constexpr unsigned int kWarp = 32;
constexpr int kMostIdleRounds = 1000;  // in which all threads have had their turn

// Lets the threads from `first` on go on if all that have not ended are at a barrier.
void ReleaseIfComplete(unsigned int first, unsigned int count, State barrier) {
  unsigned int arrived = 0;
  unsigned int ended = 0;
  for (unsigned int t = first; t < first + count; ++t) {
    arrived += states[t] == barrier ? 1 : 0;
    ended += states[t] == State::kDone ? 1 : 0;
  }
  if (arrived == 0 || arrived + ended < count) return;
  if (ended > 0) Stop("a barrier that not all threads reach");
  for (unsigned int t = first; t < first + count; ++t) states[t] = State::kRunning;
  has_progress = true;
}

// Whether a thread is left out of a round: now and then for itself, and mostly with its warp for a
// few rounds, in which others get ahead as far as barriers let them.
bool IsLate(unsigned int thread, unsigned int round) {
  const auto hash = [](unsigned int a, unsigned int b) {
    return (a * 2654435761u ^ b * 40503u) * 2246822519u >> 24;
  };
  return hash(thread, round) % 8 == 0 || hash(thread / kWarp, round / 4) % 4 != 0;
}

void RunBlock(unsigned int threads) {
  for (unsigned int t = 0; t < threads; ++t) states[t] = State::kRunning;
  int idle_rounds = 0;
  for (unsigned int round = 0;; ++round) {
    has_progress = false;
    bool is_over = true;
    for (unsigned int i = 0; i < threads; ++i) {
      const unsigned int t = round % 2 == 0 ? i : threads - 1 - i;
      if (states[t] == State::kRunning) {
        if (!IsLate(t, round)) Resume(fibers[t].get(), t);
        has_progress |= states[t] != State::kRunning;
      }
      is_over &= states[t] == State::kDone;
    }
    if (is_over) return;
    for (unsigned int first = 0; first < threads; first += kWarp) {
      ReleaseIfComplete(first, std::min(kWarp, threads - first), State::kAtWarpBarrier);
    }
    ReleaseIfComplete(0, threads, State::kAtBarrier);
    idle_rounds = has_progress ? 0 : idle_rounds + 1;
    if (idle_rounds == kMostIdleRounds) Stop("threads wait for what never happens");
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

void WaitAt(State barrier) {
  const unsigned int thread = threadIdx.x;
  states[thread] = barrier;
  LeaveFiber();
  if (threadIdx.x != thread) Stop("a fiber runs as another thread");
}

}  // namespace

void Do(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
}

std::vector<Copy> TakeStartedCopies() { return std::exchange(current->started, {}); }

void LetOthersRun() { LeaveFiber(); }

void NoteProgress() { has_progress = true; }

void Stop(const char* what) {
  std::fprintf(stderr, "emulation: %s\n", what);
  std::abort();
}

cudaError_t SetSharedLimit(const void* kernel, int bytes) {
  if (bytes > device.shared_per_block) return last_error = cudaErrorInvalidValue;
  shared_limits[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t Run(const void* kernel, const cudaLaunchConfig_t& config,
                const std::function<void()>& thread) {
  const int limit = shared_limits.count(kernel) != 0 ? shared_limits[kernel] : kDefaultSharedLimit;
  if (device.launch_error != cudaSuccess) return last_error = device.launch_error;
  if (config.gridDim.x == 0 || config.gridDim.x > INT32_MAX || config.gridDim.y == 0 ||
      config.gridDim.y > 65535 || config.blockDim.x == 0 || config.blockDim.x > kMostThreads ||
      config.dynamicSmemBytes > static_cast<size_t>(limit)) {
    return last_error = cudaErrorInvalidConfiguration;
  }
  ++num_launches;
  gridDim = dim3(std::min(config.gridDim.x, device.most_blocks), config.gridDim.y);
  blockDim = config.blockDim;
  thread_function = &thread;
  MakeFibers(blockDim.x);
  for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
      PrepareSharedMemory(config.dynamicSmemBytes);
      ForgetBarriers();
      RunBlock(blockDim.x);
    }
  }
  return cudaSuccess;
}

}  // namespace emulation

void __syncthreads() { emulation::WaitAt(emulation::State::kAtBarrier); }

void __syncwarp() { emulation::WaitAt(emulation::State::kAtWarpBarrier); }

float __shfl_xor_sync(unsigned int lanes, float given, int distance) {
  static float gifts[emulation::kMostThreads];
  if (lanes != 0xffffffffu || distance < 1 || distance > 31) emulation::Stop("a wrong shuffle");
  const unsigned int thread = threadIdx.x;
  gifts[thread] = given;
  __syncwarp();
  const float taken = gifts[thread ^ static_cast<unsigned int>(distance)];
  __syncwarp();
  return taken;
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
    emulation::Do(committed.front());
    committed.erase(committed.begin());
  }
}

cudaError_t cudaGetDevice(int* index) {
  *index = emulation::device.index;
  if (emulation::device.error != cudaSuccess) emulation::last_error = emulation::device.error;
  return emulation::device.error;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulation::device.num_processors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulation::device.has_accelerator ? 9 : 8;
      break;
    default:
      *value = emulation::device.shared_per_block;
  }
  return cudaSuccess;
}

namespace {

// cuTensorMapEncodeTiled, with the checks of its arguments that depend on the caller.
CUresult EncodeTensorMap(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* start,
                         const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                         const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                         CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (rank != 3 || reinterpret_cast<uintptr_t>(start) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  *map = {static_cast<const char*>(start), {}, {}, {}};
  for (int i = 0; i < 3; ++i) {
    if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32) return CUDA_ERROR_INVALID_VALUE;
    if (box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    map->sizes[i] = sizes[i];
    map->box[i] = box[i];
  }
  for (int i = 0; i < 2; ++i) {
    if (strides[i] % 16 != 0 || strides[i] >= uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
    map->strides[i] = strides[i];
  }
  return box[0] % 16 == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned int,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(EncodeTensorMap);
  *result = cudaDriverEntryPointSuccess;
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
