// LMKAN2D: checks the tensors, maps them onto the C interface, and calls it on ONNX Runtime's
// threads.
#include "lookup2d_op.h"

#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <thread>

#include "lmkan/lookup2d.h"

namespace lmkan::ort {
namespace {

// --- Types
// -----------------------------------------------------------------------------------------

constexpr ONNXTensorElementDataType kOnnxTypes[3] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                                     ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                                                     ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16};

// The definition as ONNX Runtime sees it, followed by what the callbacks need.
struct Lookup2dOp : OrtCustomOp {
  lmkan_dtype x_dtype;
  lmkan_dtype table_dtype;
  const OrtApi* api;
};

const Lookup2dOp& Self(const OrtCustomOp* op) { return *static_cast<const Lookup2dOp*>(op); }

struct DestroyTable {
  void operator()(lmkan_cpu_table* table) const { lmkan_cpu_table_destroy(table); }
};
using TableHandle = std::unique_ptr<lmkan_cpu_table, DestroyTable>;

// A node of a session. Immutable after its creation, because Run may be called from many threads.
struct Kernel {
  const OrtApi* api;
  std::string node;
  lmkan_dtype x_dtype;
  lmkan_dtype table_dtype;
  int32_t num_threads;
  TableHandle constant_table;  // null when the table is computed or fed
  lmkan_table_desc constant_desc;
};

// --- Errors
// ----------------------------------------------------------------------------------------

constexpr size_t kMessageSize = 512;

OrtStatus* Error(const Kernel& kernel, const char* message) {
  char text[kMessageSize + 256];
  std::snprintf(text, sizeof text, "LMKAN2D node \"%.160s\": %s", kernel.node.c_str(), message);
  return kernel.api->CreateStatus(ORT_INVALID_ARGUMENT, text);
}

// --- Shapes
// ----------------------------------------------------------------------------------------

constexpr size_t kMaxRank = 16;

struct Shape {
  size_t rank = 0;
  int64_t dims[kMaxRank];
  int64_t count = 0;

  void Format(char* text, size_t size) const {
    size_t used = static_cast<size_t>(std::snprintf(text, size, "["));
    for (size_t i = 0; i < rank && used < size; ++i) {
      used += static_cast<size_t>(std::snprintf(
          text + used, size - used, i == 0 ? "%lld" : ", %lld", static_cast<long long>(dims[i])));
    }
    if (used < size) std::snprintf(text + used, size - used, "]");
  }
};

OrtStatus* GetShape(const Kernel& kernel, const char* name, const OrtValue* value, Shape* shape) {
  const OrtApi* api = kernel.api;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* error = api->GetTensorTypeAndShape(value, &info)) return error;
  OrtStatus* error = api->GetDimensionsCount(info, &shape->rank);
  if (error == nullptr && shape->rank > kMaxRank) {
    char text[kMessageSize];
    std::snprintf(text, sizeof text, "expected %s of rank %zu at most, found rank %zu", name,
                  kMaxRank, shape->rank);
    error = Error(kernel, text);
  }
  if (error == nullptr) error = api->GetDimensions(info, shape->dims, shape->rank);
  api->ReleaseTensorTypeAndShapeInfo(info);
  shape->count = 1;
  for (size_t i = 0; error == nullptr && i < shape->rank; ++i) shape->count *= shape->dims[i];
  return error;
}

// --- The table
// -------------------------------------------------------------------------------------

OrtStatus* DescribeTable(const Kernel& kernel, const OrtValue* value, lmkan_table_desc* desc) {
  Shape shape;
  if (OrtStatus* error = GetShape(kernel, "table", value, &shape)) return error;
  if (shape.rank != 4 || shape.dims[1] != shape.dims[2] || shape.dims[1] < 4 || shape.dims[0] < 1 ||
      shape.dims[3] < 1) {
    char found[160], text[kMessageSize];
    shape.Format(found, sizeof found);
    std::snprintf(text, sizeof text,
                  "expected table [pairs, G+1, G+1, outputs] with equal grid axes, G >= 3 and at "
                  "least 1 pair and 1 output, found %s",
                  found);
    return Error(kernel, text);
  }
  void* data = nullptr;
  // The C API has no read-only access; nothing is written through this pointer.
  if (OrtStatus* error = kernel.api->GetTensorMutableData(const_cast<OrtValue*>(value), &data)) {
    return error;
  }
  *desc = {data, kernel.table_dtype, shape.dims[0], shape.dims[1] - 1, shape.dims[3]};
  return nullptr;
}

OrtStatus* MakeTable(const Kernel& kernel, const lmkan_table_desc& desc, lmkan_ownership ownership,
                     TableHandle* handle) {
  char message[kMessageSize];
  lmkan_cpu_table* table = nullptr;
  if (lmkan_cpu_table_create(&desc, ownership, LMKAN_ISA_AUTO, &table, message, sizeof message) !=
      LMKAN_OK) {
    return Error(kernel, message);
  }
  handle->reset(table);
  return nullptr;
}

// --- Creation
// --------------------------------------------------------------------------------------

OrtStatus* ReadNodeName(const OrtApi* api, const OrtKernelInfo* info, std::string* name) {
  size_t size = 0;
  if (OrtStatus* error = api->KernelInfo_GetNodeName(info, nullptr, &size)) return error;
  std::unique_ptr<char[]> text(new (std::nothrow) char[size + 1]());
  if (text == nullptr) return api->CreateStatus(ORT_FAIL, "no memory for a node name");
  if (OrtStatus* error = api->KernelInfo_GetNodeName(info, text.get(), &size)) return error;
  name->assign(text.get());
  return nullptr;
}

OrtStatus* Initialize(const Lookup2dOp& op, const OrtApi* api, const OrtKernelInfo* info,
                      Kernel* kernel) {
  kernel->api = api;
  kernel->x_dtype = op.x_dtype;
  kernel->table_dtype = op.table_dtype;
  const unsigned threads = std::thread::hardware_concurrency();
  kernel->num_threads = threads == 0 ? 1 : static_cast<int32_t>(threads);
  if (OrtStatus* error = ReadNodeName(api, info, &kernel->node)) return error;

  int is_constant = 0;
  const OrtValue* value = nullptr;
  if (OrtStatus* error = api->KernelInfoGetConstantInput_tensor(info, 1, &is_constant, &value)) {
    return error;
  }
  if (is_constant == 0 || value == nullptr) return nullptr;
  if (OrtStatus* error = DescribeTable(*kernel, value, &kernel->constant_desc)) return error;
  return MakeTable(*kernel, kernel->constant_desc, LMKAN_COPY, &kernel->constant_table);
}

OrtStatus* ORT_API_CALL CreateKernel(const OrtCustomOp* op, const OrtApi* api,
                                     const OrtKernelInfo* info, void** result) {
  try {
    auto kernel = std::make_unique<Kernel>();
    if (OrtStatus* error = Initialize(Self(op), api, info, kernel.get())) return error;
    *result = kernel.release();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return api->CreateStatus(ORT_FAIL, "LMKAN2D: no memory for the kernel of a node");
  }
}

void ORT_API_CALL DestroyKernel(void* kernel) { delete static_cast<Kernel*>(kernel); }

// --- Computation
// -----------------------------------------------------------------------------------

OrtStatus* CheckX(const Kernel& kernel, const Shape& x, const lmkan_table_desc& desc) {
  const int64_t features = 2 * desc.num_pairs;
  if (x.rank >= 1 && x.dims[x.rank - 1] == features) return nullptr;
  char found[160], text[kMessageSize];
  x.Format(found, sizeof found);
  std::snprintf(text, sizeof text,
                "expected x [..., %lld] because the table has %lld pairs of features, found %s",
                static_cast<long long>(features), static_cast<long long>(desc.num_pairs), found);
  return Error(kernel, text);
}

// What the tasks of one call share.
struct Call {
  const lmkan_cpu_table* table;
  lmkan_dtype dtype;
  const void* x;
  void* y;
  int64_t rows;
  int64_t num_tasks;
  std::atomic<bool> failed{false};
  char message[kMessageSize];
};

void RunTask(void* data, size_t task) {
  auto* call = static_cast<Call*>(data);
  char message[kMessageSize];
  if (lmkan_cpu_lookup2d(call->table, call->dtype, call->x, call->y, call->rows,
                         static_cast<int64_t>(task), call->num_tasks, message,
                         sizeof message) != LMKAN_OK &&
      !call->failed.exchange(true)) {
    std::memcpy(call->message, message, sizeof message);  // the first failure's
  }
}

OrtStatus* ORT_API_CALL Compute(void* op_kernel, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(op_kernel);
  const OrtApi* api = kernel.api;

  // The table.
  lmkan_table_desc desc = kernel.constant_desc;
  TableHandle borrowed;
  const lmkan_cpu_table* table = kernel.constant_table.get();
  if (table == nullptr) {
    const OrtValue* value = nullptr;
    if (OrtStatus* error = api->KernelContext_GetInput(context, 1, &value)) return error;
    if (OrtStatus* error = DescribeTable(kernel, value, &desc)) return error;
    if (OrtStatus* error = MakeTable(kernel, desc, LMKAN_BORROW, &borrowed)) return error;
    table = borrowed.get();
  }

  // x and y.
  const OrtValue* x = nullptr;
  Shape shape;
  if (OrtStatus* error = api->KernelContext_GetInput(context, 0, &x)) return error;
  if (OrtStatus* error = GetShape(kernel, "x", x, &shape)) return error;
  if (OrtStatus* error = CheckX(kernel, shape, desc)) return error;
  Call call;
  call.table = table;
  call.dtype = kernel.x_dtype;
  call.rows = shape.count / (2 * desc.num_pairs);
  shape.dims[shape.rank - 1] = desc.num_outputs;
  OrtValue* y = nullptr;
  if (OrtStatus* error = api->KernelContext_GetOutput(context, 0, shape.dims, shape.rank, &y)) {
    return error;
  }
  if (call.rows == 0) return nullptr;
  void* x_data = nullptr;
  if (OrtStatus* error = api->GetTensorMutableData(const_cast<OrtValue*>(x), &x_data)) return error;
  if (OrtStatus* error = api->GetTensorMutableData(y, &call.y)) return error;
  call.x = x_data;

  // The lookup.
  call.num_tasks = lmkan_cpu_num_tasks(table, call.rows, kernel.num_threads);
  if (call.num_tasks == 1) {
    RunTask(&call, 0);
  } else if (OrtStatus* error = api->KernelContext_ParallelFor(
                 context, RunTask, static_cast<size_t>(call.num_tasks), 0, &call)) {
    return error;
  }
  return call.failed ? Error(kernel, call.message) : nullptr;
}

// --- Shape inference
// -------------------------------------------------------------------------------

// Rank, sizes (-1 or 0 where unknown) and symbolic names of an input.
struct KnownShape {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  size_t rank = 0;
  int64_t dims[kMaxRank];
  const char* names[kMaxRank];  // owned by the context
};

OrtStatus* GetKnownShape(const OrtApi* api, const OrtShapeInferContext* context, size_t index,
                         KnownShape* shape) {
  OrtTensorTypeAndShapeInfo* info = nullptr;  // stays the context's
  if (OrtStatus* error = api->ShapeInferContext_GetInputTypeShape(context, index, &info))
    return error;
  if (OrtStatus* error = api->GetTensorElementType(info, &shape->type)) return error;
  if (OrtStatus* error = api->GetDimensionsCount(info, &shape->rank)) return error;
  if (shape->rank > kMaxRank) shape->rank = 0;
  if (OrtStatus* error = api->GetDimensions(info, shape->dims, shape->rank)) return error;
  return api->GetSymbolicDimensions(info, shape->names, shape->rank);
}

// ONNX Runtime calls the first definition's function for all of them, so the type is x's, not op's.
// y has x's dimensions, the last one replaced by the table's last. Nothing is said where a rank is
// unknown (0 here); mistakes are reported by the computation, which knows the node's name.
OrtStatus* ORT_API_CALL InferShape(const OrtCustomOp* op, OrtShapeInferContext* context) {
  const OrtApi* api = Self(op).api;
  KnownShape x, table;
  if (OrtStatus* error = GetKnownShape(api, context, 0, &x)) return error;
  if (OrtStatus* error = GetKnownShape(api, context, 1, &table)) return error;
  if (x.rank == 0 || table.rank != 4) return nullptr;

  x.dims[x.rank - 1] = table.dims[3];
  x.names[x.rank - 1] = table.names[3];
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* error = api->CreateTensorTypeAndShapeInfo(&info)) return error;
  OrtStatus* error = api->SetTensorElementType(info, x.type);
  if (error == nullptr) error = api->SetDimensions(info, x.dims, x.rank);
  if (error == nullptr) error = api->SetSymbolicDimensions(info, x.names, x.rank);
  if (error == nullptr) error = api->ShapeInferContext_SetOutputTypeShape(context, 0, info);
  api->ReleaseTensorTypeAndShapeInfo(info);
  return error;
}

// --- Definitions
// -----------------------------------------------------------------------------------

Lookup2dOp MakeOp(lmkan_dtype x_dtype, lmkan_dtype table_dtype) {
  Lookup2dOp op = {};
  op.version = kOrtApiVersion;
  op.x_dtype = x_dtype;
  op.table_dtype = table_dtype;
  op.GetName = [](const OrtCustomOp*) { return "LMKAN2D"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // CPU
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 2; };
  op.GetInputType = [](const OrtCustomOp* self, size_t index) {
    return kOnnxTypes[index == 0 ? Self(self).x_dtype : Self(self).table_dtype];
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp* self, size_t) { return kOnnxTypes[Self(self).x_dtype]; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = CreateKernel;
  op.KernelComputeV2 = Compute;
  op.KernelDestroy = DestroyKernel;
  op.InferOutputShapeFn = InferShape;
  return op;
}

}  // namespace

const OrtCustomOp* MakeLookup2dOp(size_t index, const OrtApi* api) {
  static Lookup2dOp ops[kNumLookup2dOps];
  const auto x_dtype = static_cast<lmkan_dtype>(index / 3);
  const auto table_dtype = static_cast<lmkan_dtype>(index % 3);
  ops[index] = MakeOp(x_dtype, table_dtype);
  ops[index].api = api;
  return &ops[index];
}

}  // namespace lmkan::ort
