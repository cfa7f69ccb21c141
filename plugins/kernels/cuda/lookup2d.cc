// The C interface: checks every argument, chooses a tactic, launches.
#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <initializer_list>

#include "launch.h"
#include "lmkan/lookup2d_cuda.h"
#include "lookup.h"
#include "plan.h"

namespace lmkan::cuda {
namespace {

// --- Messages
// --------------------------------------------------------------------------------------

// Where the caller wants the message; `text` may be null.
struct Message {
  char* text;
  size_t size;
};

// Writes the formatted message and returns `status`.
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
lmkan_status Fail(lmkan_status status, const Message& message, const char* format, ...) {
  if (message.text != nullptr && message.size > 0) {
    va_list values;
    va_start(values, format);
    std::vsnprintf(message.text, message.size, format, values);
    va_end(values);
  }
  return status;
}

lmkan_status FailCall(cudaError_t error, const Message& message, const char* call) {
  // The runtime keeps the error for the thread's next question; it is reported here instead. Errors
  // that spoil the context stay.
  cudaGetLastError();
  return Fail(LMKAN_CUDA_ERROR, message, "%s failed: %s (%s)", call, cudaGetErrorString(error),
              cudaGetErrorName(error));
}

// --- Checks
// ----------------------------------------------------------------------------------------

// Whether a product of positive factors is at least 2^62. Where it isn't, no size or offset
// computed later can overflow.
bool IsTooLarge(std::initializer_list<int64_t> factors) {
  int64_t product = 2;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) return true;
  }
  return false;
}

lmkan_status CheckDesc(const lmkan_table_desc* desc, const Message& message) {
  if (desc == nullptr) {
    return Fail(LMKAN_INVALID_ARGUMENT, message, "expected a table, found a null pointer");
  }
  if (desc->dtype < LMKAN_FLOAT32 || desc->dtype > LMKAN_INT8) {
    return Fail(LMKAN_INVALID_ARGUMENT, message,
                "expected a table of float32 (0), float16 (1), bfloat16 (2) or int8 (3), found "
                "dtype %d",
                desc->dtype);
  }
  if (desc->num_pairs < 1 || desc->num_outputs < 1) {
    return Fail(LMKAN_INVALID_ARGUMENT, message,
                "expected at least 1 pair and 1 output, found %lld pairs and %lld outputs",
                static_cast<long long>(desc->num_pairs), static_cast<long long>(desc->num_outputs));
  }
  // A cell index must fit 32 bits.
  constexpr int64_t kMostGrids = 46339;
  if (desc->num_grids < 3 || desc->num_grids > kMostGrids) {
    return Fail(LMKAN_INVALID_ARGUMENT, message,
                "expected 3 to %lld grid cells an axis, found %lld",
                static_cast<long long>(kMostGrids), static_cast<long long>(desc->num_grids));
  }
  const int64_t points = desc->num_grids + 1;
  if (desc->num_outputs > INT64_MAX / 2 ||
      IsTooLarge({int64_t{sizeof(float)}, desc->num_pairs, points, points, desc->num_outputs})) {
    return Fail(
        LMKAN_INVALID_ARGUMENT, message,
        "expected a table of less than 2^62 bytes, found %lld pairs, %lld grid cells an axis "
        "and %lld outputs",
        static_cast<long long>(desc->num_pairs), static_cast<long long>(desc->num_grids),
        static_cast<long long>(desc->num_outputs));
  }
  return LMKAN_OK;
}

lmkan_status CheckDtype(lmkan_dtype dtype, const Message& message) {
  if (dtype >= LMKAN_FLOAT32 && dtype <= LMKAN_BFLOAT16) return LMKAN_OK;
  return Fail(LMKAN_INVALID_ARGUMENT, message,
              "expected x of float32 (0), float16 (1) or bfloat16 (2), found dtype %d", dtype);
}

lmkan_status CheckRows(const lmkan_table_desc& desc, int64_t rows, const Message& message) {
  if (rows < 0) {
    return Fail(LMKAN_INVALID_ARGUMENT, message, "expected at least 0 rows, found %lld",
                static_cast<long long>(rows));
  }
  if (rows > 0 && (IsTooLarge({int64_t{sizeof(float)}, 2, desc.num_pairs, rows}) ||
                   IsTooLarge({int64_t{sizeof(float)}, desc.num_outputs, rows}))) {
    return Fail(LMKAN_INVALID_ARGUMENT, message,
                "expected x and y of less than 2^62 bytes, found %lld rows",
                static_cast<long long>(rows));
  }
  return LMKAN_OK;
}

lmkan_status CheckTactic(lmkan_cuda_tactic tactic, const Message& message) {
  if (tactic >= LMKAN_CUDA_AUTO && tactic <= LMKAN_CUDA_SPLIT) return LMKAN_OK;
  return Fail(
      LMKAN_INVALID_ARGUMENT, message,
      "expected a tactic of AUTO (0), GATHER (1), SHARED (2), NARROW (3) or SPLIT (4), found %d",
      tactic);
}

lmkan_status CheckTable(const lmkan_table_desc& desc, const Message& message) {
  if (desc.data == nullptr) {
    return Fail(LMKAN_INVALID_ARGUMENT, message, "expected a table, found a null pointer");
  }
  if ((desc.dtype == LMKAN_INT8) != (desc.scales != nullptr)) {
    return Fail(LMKAN_INVALID_ARGUMENT, message,
                "expected scales for a table of int8 and for no other, found dtype %d %s scales",
                desc.dtype, desc.scales == nullptr ? "without" : "with");
  }
  return LMKAN_OK;
}

lmkan_status CheckAlignment(const void* pointer, const char* name, const Message& message) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address % kChunkBytes == 0) return LMKAN_OK;
  return Fail(LMKAN_INVALID_ARGUMENT, message, "expected %s aligned to 16 bytes, found address %p",
              name, pointer);
}

// --- Device
// ----------------------------------------------------------------------------------------

cudaError_t GetDevice(Device* device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  int processors = 0;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index);
  if (error != cudaSuccess) return error;
  int shared = 0;
  error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (error != cudaSuccess) return error;
  int major = 0;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  *device = {processors, shared, major >= 9 && HasBulkCode(index)};
  return error;
}

Problem DescribeProblem(const lmkan_table_desc& desc, int64_t rows) {
  return {desc.dtype, rows, desc.num_pairs, desc.num_outputs, static_cast<int32_t>(desc.num_grids)};
}

Lookup MakeLookup(const lmkan_table_desc& desc, lmkan_dtype dtype, const void* x, void* y,
                  int64_t rows) {
  Lookup lookup = {};
  lookup.table = desc.data;
  lookup.scales = desc.scales;
  lookup.x = x;
  lookup.y = y;
  lookup.rows = rows;
  lookup.num_pairs = desc.num_pairs;
  lookup.num_outputs = desc.num_outputs;
  lookup.num_grids = static_cast<int32_t>(desc.num_grids);
  lookup.table_dtype = desc.dtype;
  lookup.x_dtype = dtype;
  if (lookup.passes_cells()) {
    double point = GridPoint(lookup.num_grids, 0);
    for (int32_t i = 0; i < lookup.num_grids; ++i) {
      const double next = GridPoint(lookup.num_grids, i + 1);
      lookup.cells[i] = MakeGridCell(point, next);
      point = next;
    }
  }
  return lookup;
}

// --- Tactics
// ---------------------------------------------------------------------------------------

// By number.
constexpr const char* kTacticNames[] = {"AUTO", "GATHER", "SHARED", "NARROW", "SPLIT"};

bool Fits(const Problem& problem, const Device& device, lmkan_cuda_tactic tactic) {
  switch (tactic) {
    case LMKAN_CUDA_SHARED:
      return PlanShared(problem, device).threads != 0;
    case LMKAN_CUDA_NARROW:
      return PlanNarrow(problem, device).warp_rows != 0;
    case LMKAN_CUDA_SPLIT:
      return PlanSplit(problem, device).shared.threads != 0;
    default:
      return true;
  }
}

cudaError_t Load(const Problem& problem, const Device& device, lmkan_cuda_tactic tactic) {
  switch (tactic) {
    case LMKAN_CUDA_SHARED: {
      const cudaError_t error = LoadShared(problem.table_dtype);
      if (error != cudaSuccess || !device.copies_in_bulk) return error;
      return LoadBulk(problem.table_dtype);
    }
    case LMKAN_CUDA_NARROW:
      return LoadNarrow(problem.table_dtype, problem.num_outputs);
    case LMKAN_CUDA_SPLIT:
      return LoadSplit(problem.table_dtype);
    default:
      return LoadGather(problem.table_dtype);
  }
}

size_t WorkspaceBytes(const lmkan_table_desc& desc, int64_t rows, lmkan_cuda_tactic tactic) {
  // Elsewhere sums stay in registers and shared memory.
  if (tactic != LMKAN_CUDA_SPLIT || rows == 0) return 0;
  return static_cast<size_t>(SplitWorkspaceBytes(DescribeProblem(desc, rows)));
}

cudaError_t LaunchTactic(const Lookup& lookup, const Problem& problem, const Device& device,
                         lmkan_cuda_tactic tactic, void* workspace, cudaStream_t stream) {
  const int32_t shared_per_block = device.shared_per_block;
  switch (tactic) {
    case LMKAN_CUDA_SHARED: {
      const SharedPlan plan = PlanShared(problem, device);
      cudaError_t error = cudaSuccess;
      if (PrefersBulk(problem, device) &&
          LaunchBulk(lookup, plan, shared_per_block, stream, &error)) {
        return error;
      }
      return LaunchShared(lookup, plan, shared_per_block, stream);
    }
    case LMKAN_CUDA_NARROW:
      return LaunchNarrow(lookup, PlanNarrow(problem, device), shared_per_block, stream);
    case LMKAN_CUDA_SPLIT:
      return LaunchSplit(lookup, PlanSplit(problem, device), workspace, shared_per_block, stream);
    default:
      return LaunchGather(lookup, PlanGather(problem, device), stream);
  }
}

lmkan_status Run(const Lookup& lookup, const Problem& problem, lmkan_cuda_tactic tactic,
                 void* workspace, cudaStream_t stream, const Message& message) {
  Device device;
  cudaError_t error = GetDevice(&device);
  if (error != cudaSuccess) return FailCall(error, message, "finding the CUDA device");
  if (tactic == LMKAN_CUDA_AUTO) {
    tactic = PrefersShared(problem, device) ? LMKAN_CUDA_SHARED : LMKAN_CUDA_GATHER;
  } else if (!Fits(problem, device, tactic)) {
    return Fail(
        LMKAN_UNSUPPORTED, message,
        "expected a tactic that this device can run for %lld pairs, %lld grid cells an axis and "
        "%lld outputs, found %s (%d): use GATHER (1) or AUTO (0)",
        static_cast<long long>(problem.num_pairs), static_cast<long long>(problem.num_grids),
        static_cast<long long>(problem.num_outputs), kTacticNames[tactic], tactic);
  }
  error = LaunchTactic(lookup, problem, device, tactic, workspace, stream);
  if (error != cudaSuccess) return FailCall(error, message, "launching the lookup");
  return LMKAN_OK;
}

}  // namespace
}  // namespace lmkan::cuda

int32_t lmkan_cuda_tactics(const lmkan_table_desc* desc, lmkan_dtype dtype,
                           lmkan_cuda_tactic* tactics, int32_t capacity) {
  using namespace lmkan::cuda;
  const Message none{nullptr, 0};
  if (CheckDesc(desc, none) != LMKAN_OK || CheckDtype(dtype, none) != LMKAN_OK) return 0;
  constexpr lmkan_cuda_tactic kBestFirst[] = {LMKAN_CUDA_NARROW, LMKAN_CUDA_SHARED,
                                              LMKAN_CUDA_SPLIT, LMKAN_CUDA_GATHER};
  lmkan_cuda_tactic found[4];
  int32_t count = 0;
  Device device;
  cudaError_t error = GetDevice(&device);
  const Problem problem = DescribeProblem(*desc, 1);
  for (const lmkan_cuda_tactic tactic : kBestFirst) {
    if (error != cudaSuccess || !Fits(problem, device, tactic)) continue;
    error = Load(problem, device, tactic);
    found[count++] = tactic;
  }
  if (error != cudaSuccess) {
    FailCall(error, none, "");
    return 0;
  }
  for (int32_t i = 0; tactics != nullptr && i < count && i < capacity; ++i) tactics[i] = found[i];
  return count;
}

lmkan_status lmkan_cuda_workspace_size(const lmkan_table_desc* desc, lmkan_dtype dtype,
                                       int64_t rows, lmkan_cuda_tactic tactic, size_t* bytes,
                                       char* message, size_t message_size) {
  using namespace lmkan::cuda;
  const Message out{message, message_size};
  lmkan_status status = CheckDesc(desc, out);
  if (status == LMKAN_OK) status = CheckDtype(dtype, out);
  if (status == LMKAN_OK) status = CheckRows(*desc, rows, out);
  if (status == LMKAN_OK) status = CheckTactic(tactic, out);
  if (status != LMKAN_OK) return status;
  if (bytes == nullptr) {
    return Fail(LMKAN_INVALID_ARGUMENT, out, "expected a place for the size, found a null pointer");
  }
  *bytes = WorkspaceBytes(*desc, rows, tactic);
  return LMKAN_OK;
}

lmkan_status lmkan_cuda_lookup2d(const lmkan_table_desc* desc, lmkan_dtype dtype, const void* x,
                                 void* y, int64_t rows, lmkan_cuda_tactic tactic, void* workspace,
                                 size_t workspace_size, void* stream, char* message,
                                 size_t message_size) {
  using namespace lmkan::cuda;
  const Message out{message, message_size};
  lmkan_status status = CheckDesc(desc, out);
  if (status == LMKAN_OK) status = CheckTable(*desc, out);
  if (status == LMKAN_OK) status = CheckDtype(dtype, out);
  if (status == LMKAN_OK) status = CheckRows(*desc, rows, out);
  if (status == LMKAN_OK) status = CheckTactic(tactic, out);
  if (status != LMKAN_OK || rows == 0) return status;
  if (x == nullptr || y == nullptr) {
    return Fail(LMKAN_INVALID_ARGUMENT, out, "expected memory for x and y, found a null pointer");
  }
  status = CheckAlignment(desc->data, "the table", out);
  if (status == LMKAN_OK) status = CheckAlignment(desc->scales, "the scales", out);
  if (status == LMKAN_OK) status = CheckAlignment(x, "x", out);
  if (status == LMKAN_OK) status = CheckAlignment(y, "y", out);
  if (status == LMKAN_OK) status = CheckAlignment(workspace, "the workspace", out);
  if (status != LMKAN_OK) return status;
  const size_t needed = WorkspaceBytes(*desc, rows, tactic);
  const size_t found = workspace == nullptr ? 0 : workspace_size;
  if (found < needed) {
    return Fail(LMKAN_INVALID_ARGUMENT, out,
                "expected a workspace of %zu bytes for tactic %s (%d), found %zu: ask "
                "lmkan_cuda_workspace_size",
                needed, kTacticNames[tactic], tactic, found);
  }
  return Run(MakeLookup(*desc, dtype, x, y, rows), DescribeProblem(*desc, rows), tactic, workspace,
             static_cast<cudaStream_t>(stream), out);
}
