// Runs the operators on the CPU, on ONNX Runtime's own threads.
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <thread>

#include "lmkan/lookup2d.h"
#include "lookup2d_op.h"
#include "node.h"

namespace lmkan::ort {
namespace {

struct DestroyTable {
  void operator()(lmkan_cpu_table* table) const { lmkan_cpu_table_destroy(table); }
};
using TableHandle = std::unique_ptr<lmkan_cpu_table, DestroyTable>;

// Immutable after its creation, because Run may be called from many threads.
struct Kernel {
  Node node;
  int32_t num_threads;
  TableHandle constant_table;  // null when the table is computed or fed
  lmkan_table_desc constant_desc;
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

OrtStatus* Initialize(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                      Kernel* kernel) {
  const unsigned threads = std::thread::hardware_concurrency();
  kernel->num_threads = threads == 0 ? 1 : static_cast<int32_t>(threads);
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
  std::atomic<bool> failed{false};
  char message[kMessageSize];
};

void RunTask(void* data, size_t task) {
  auto* call = static_cast<Call*>(data);
  char message[kMessageSize];
  if (lmkan_cpu_lookup2d(call->table, call->dtype, call->rows.x, call->rows.y, call->rows.count,
                         static_cast<int64_t>(task), call->num_tasks, message,
                         sizeof message) != LMKAN_OK &&
      !call->failed.exchange(true)) {
    std::memcpy(call->message, message, sizeof message);  // the first failure's
  }
}

OrtStatus* ORT_API_CALL Compute(void* op_kernel, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(op_kernel);
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
  call.num_tasks = lmkan_cpu_num_tasks(table, call.rows.count, kernel.num_threads);
  if (call.num_tasks == 1) {
    RunTask(&call, 0);
  } else if (OrtStatus* error = node.api->KernelContext_ParallelFor(
                 context, RunTask, static_cast<size_t>(call.num_tasks), 0, &call)) {
    return error;
  }
  return call.failed ? Error(node, call.message) : nullptr;
}

const char* ORT_API_CALL Type(const OrtCustomOp*) { return nullptr; }

}  // namespace

const Provider kCpuProvider = {Type, Create, Compute, Destroy};

}  // namespace lmkan::ort
