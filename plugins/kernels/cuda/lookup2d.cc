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
  if (tactic >= LMKAN_CUDA_AUTO && tactic <= LMKAN_CUDA_NARROW) return LMKAN_OK;
  return Fail(LMKAN_INVALID_ARGUMENT, message,
              "expected a tactic of AUTO (0), GATHER (1), SHARED (2) or NARROW (3), found %d",
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

lmkan_status Run(const lmkan_table_desc& desc, lmkan_dtype dtype, const void* x, void* y,
                 int64_t rows, lmkan_cuda_tactic tactic, cudaStream_t stream,
                 const Message& message) {
  Device device;
  cudaError_t error = GetDevice(&device);
  if (error != cudaSuccess) return FailCall(error, message, "finding the CUDA device");
  const Problem problem = DescribeProblem(desc, rows);
  const Lookup lookup = MakeLookup(desc, dtype, x, y, rows);
  const bool is_shared =
      tactic == LMKAN_CUDA_SHARED || (tactic == LMKAN_CUDA_AUTO && PrefersShared(problem, device));
  if (tactic == LMKAN_CUDA_NARROW) {
    const NarrowPlan plan = PlanNarrow(problem, device);
    if (plan.warp_rows == 0) {
      return Fail(
          LMKAN_UNSUPPORTED, message,
          "expected at most %d outputs for tactic NARROW (3), and %d pairs' slices within the "
          "%d bytes of shared memory of this device, found %lld outputs and %lld grid cells "
          "an axis: use tactic GATHER (1) or AUTO (0)",
          kNarrowMostOutputs, 32, device.shared_per_block, static_cast<long long>(desc.num_outputs),
          static_cast<long long>(desc.num_grids));
    }
    error = LaunchNarrow(lookup, plan, device.shared_per_block, stream);
  } else if (is_shared) {
    const SharedPlan plan = PlanShared(problem, device);
    if (plan.threads == 0) {
      return Fail(
          LMKAN_UNSUPPORTED, message,
          "%lld grid cells an axis do not fit the %d bytes of shared memory of this device: "
          "use tactic GATHER (1) or AUTO (0)",
          static_cast<long long>(desc.num_grids), device.shared_per_block);
    }
    if (!PrefersBulk(problem, device) ||
        !LaunchBulk(lookup, plan, device.shared_per_block, stream, &error)) {
      error = LaunchShared(lookup, plan, device.shared_per_block, stream);
    }
  } else {
    error = LaunchGather(lookup, PlanGather(problem, device), stream);
  }
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
  lmkan_cuda_tactic found[3];
  int32_t count = 0;
  Device device;
  cudaError_t error = GetDevice(&device);
  if (error == cudaSuccess && PlanNarrow(DescribeProblem(*desc, 1), device).warp_rows != 0) {
    error = LoadNarrow(desc->dtype, desc->num_outputs);
    found[count++] = LMKAN_CUDA_NARROW;
  }
  if (error == cudaSuccess && PlanShared(DescribeProblem(*desc, 1), device).threads != 0) {
    error = LoadShared(desc->dtype);
    if (error == cudaSuccess && device.copies_in_bulk) error = LoadBulk(desc->dtype);
    found[count++] = LMKAN_CUDA_SHARED;
  }
  if (error == cudaSuccess) {
    error = LoadGather(desc->dtype);
    found[count++] = LMKAN_CUDA_GATHER;
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
  *bytes = 0;  // sums stay in registers and shared memory
  return LMKAN_OK;
}

lmkan_status lmkan_cuda_lookup2d(const lmkan_table_desc* desc, lmkan_dtype dtype, const void* x,
                                 void* y, int64_t rows, lmkan_cuda_tactic tactic, void*, size_t,
                                 void* stream, char* message, size_t message_size) {
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
  if (status != LMKAN_OK) return status;
  return Run(*desc, dtype, x, y, rows, tactic, static_cast<cudaStream_t>(stream), out);
}
