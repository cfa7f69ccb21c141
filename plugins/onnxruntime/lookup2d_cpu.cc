// Runs the operators on the CPU, on ONNX Runtime's own threads.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <thread>

#include "lmkan/lookup2d.h"
#include "lookup2d_op.h"
#include "node.h"
#include "thread_estimate.h"

namespace lmkan::ort {
namespace {

struct DestroyTable {
  void operator()(lmkan_cpu_table* table) const { lmkan_cpu_table_destroy(table); }
};
using TableHandle = std::unique_ptr<lmkan_cpu_table, DestroyTable>;

// Run may be called from many threads: all but `threads` is immutable after its creation.
struct Kernel {
  Node node;
  TableHandle constant_table;  // null when the table is computed or fed
  lmkan_table_desc constant_desc;
  ThreadEstimate threads{std::max(1, static_cast<int32_t>(std::thread::hardware_concurrency()))};
};

OrtStatus* MakeTable(const Node& node, const lmkan_table_desc& desc, lmkan_ownership ownership,
                     TableHandle* handle) {
  char message[kMessageSize];
  lmkan_cpu_table* table = nullptr;
  if (lmkan_cpu_table_create(&desc, ownership, LMKAN_ISA_AUTO, &table, message, sizeof message) !=
      LMKAN_OK) {
    return Error(node, message);
  }
  handle->reset(table);
  return nullptr;
}

// Entries whose exponent has all bits set, of an element type of this size.
template <class Bits>
int64_t CountNonFinite(const void* data, int64_t count, Bits exponent) {
  const Bits* const bits = static_cast<const Bits*>(data);
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += (bits[i] & exponent) == exponent ? 1 : 0;
  return found;
}

// Refuses what the exporter refuses too: a table that no training ends with.
OrtStatus* CheckFinite(const Node& node, const lmkan_table_desc& desc) {
  const int64_t points = desc.num_grids + 1;
  const int64_t scales = desc.num_pairs * desc.num_outputs;
  const int64_t entries = scales * points * points;
  int64_t found = 0;
  switch (desc.dtype) {
    case LMKAN_FLOAT32:
      found = CountNonFinite<uint32_t>(desc.data, entries, 0x7f800000u);
      break;
    case LMKAN_FLOAT16:
      found = CountNonFinite<uint16_t>(desc.data, entries, 0x7c00u);
      break;
    case LMKAN_BFLOAT16:
      found = CountNonFinite<uint16_t>(desc.data, entries, 0x7f80u);
      break;
    default:
      found = CountNonFinite<uint32_t>(desc.scales, scales, 0x7f800000u);
  }
  if (found == 0) return nullptr;
  char text[kMessageSize];
  std::snprintf(
      text, sizeof text,
      "expected finite values in %s, found %lld NaN or infinite ones; export a checkpoint from "
      "before the training diverged",
      desc.dtype == LMKAN_INT8 ? "scale" : "table", static_cast<long long>(found));
  return Error(node, text);
}

OrtStatus* Initialize(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                      Kernel* kernel) {
  Node& node = kernel->node;
  if (OrtStatus* error = ReadNode(op, api, info, &node)) return error;

  const OrtValue* constants[2] = {};
  for (size_t i = 0; i < node.num_constants(); ++i) {
    int is_constant = 0;
    if (OrtStatus* error =
            api->KernelInfoGetConstantInput_tensor(info, i + 1, &is_constant, &constants[i])) {
      return error;
    }
    if (is_constant == 0 || constants[i] == nullptr) return nullptr;
  }
  if (OrtStatus* error = DescribeTable(node, constants[0], constants[1], &kernel->constant_desc)) {
    return error;
  }
  if (OrtStatus* error = CheckFinite(node, kernel->constant_desc)) return error;
  return MakeTable(node, kernel->constant_desc, LMKAN_COPY, &kernel->constant_table);
}

OrtStatus* ORT_API_CALL Create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                               void** result) {
  try {
    auto kernel = std::make_unique<Kernel>();
    if (OrtStatus* error = Initialize(op, api, info, kernel.get())) return error;
    *result = kernel.release();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return api->CreateStatus(ORT_FAIL, "lmkan: no memory for the kernel of a node");
  }
}

void ORT_API_CALL Destroy(void* kernel) { delete static_cast<Kernel*>(kernel); }

// What the tasks of one call share.
struct Call {
  const lmkan_cpu_table* table;
  lmkan_dtype dtype;
  Rows rows;
  int64_t num_tasks;
  CallThreads threads;
  std::atomic<bool> failed{false};
  char message[kMessageSize];
};

void RunTask(void* data, size_t task) {
  auto* call = static_cast<Call*>(data);
  call->threads.CountMe();
  char message[kMessageSize];
  if (lmkan_cpu_lookup2d(call->table, call->dtype, call->rows.x, call->rows.y, call->rows.count,
                         static_cast<int64_t>(task), call->num_tasks, message,
                         sizeof message) != LMKAN_OK &&
      !call->failed.exchange(true)) {
    std::memcpy(call->message, message, sizeof message);  // the first failure's
  }
}

// Rows times pairs times outputs, as far as 63 bits go.
int64_t Evaluations(const lmkan_table_desc& desc, int64_t rows) {
  int64_t product;
  return __builtin_mul_overflow(rows, desc.num_pairs * desc.num_outputs, &product) ? INT64_MAX
                                                                                   : product;
}

OrtStatus* ORT_API_CALL Compute(void* op_kernel, OrtKernelContext* context) {
  Kernel& kernel = *static_cast<Kernel*>(op_kernel);
  const Node& node = kernel.node;

  // The table.
  lmkan_table_desc desc = kernel.constant_desc;
  TableHandle borrowed;
  const lmkan_cpu_table* table = kernel.constant_table.get();
  if (table == nullptr) {
    if (OrtStatus* error = DescribeTableOf(node, context, &desc)) return error;
    if (OrtStatus* error = MakeTable(node, desc, LMKAN_BORROW, &borrowed)) return error;
    table = borrowed.get();
  }

  // x and y.
  Call call;
  call.table = table;
  call.dtype = node.op->x_dtype;
  if (OrtStatus* error = MapRows(node, context, desc, &call.rows)) return error;
  if (call.rows.count == 0) return nullptr;

  // The lookup.
  const int64_t evaluations = Evaluations(desc, call.rows.count);
  call.num_tasks = lmkan_cpu_num_tasks(table, call.rows.count, kernel.threads.Threads(evaluations));
  if (call.num_tasks == 1) {
    RunTask(&call, 0);
  } else {
    if (OrtStatus* error = node.api->KernelContext_ParallelFor(
            context, RunTask, static_cast<size_t>(call.num_tasks), 0, &call)) {
      return error;
    }
    kernel.threads.Record(evaluations, call.threads.count());
  }
  return call.failed ? Error(node, call.message) : nullptr;
}

const char* ORT_API_CALL Type(const OrtCustomOp*) { return nullptr; }

}  // namespace

const Provider kCpuProvider = {Type, Create, Compute, Destroy};

}  // namespace lmkan::ort
