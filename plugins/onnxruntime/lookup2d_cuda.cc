// Runs the operators in the CUDA provider, on ONNX Runtime's compute stream.
#include "lmkan/lookup2d_cuda.h"

#include <memory>
#include <new>

#include "lookup2d_op.h"
#include "node.h"

namespace lmkan::ort {
namespace {

OrtStatus* ORT_API_CALL Create(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                               void** result) {
  try {
    auto node = std::make_unique<Node>();
    if (OrtStatus* error = ReadNode(op, api, info, node.get())) return error;
    *result = node.release();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return api->CreateStatus(ORT_FAIL, "lmkan: no memory for the kernel of a node");
  }
}

void ORT_API_CALL Destroy(void* node) { delete static_cast<Node*>(node); }

// Memory of the provider's arena, on the device of x, for one call. The arena hands it out again in
// the stream's order, so kernels that are still in flight keep it to themselves.
class Workspace {
 public:
  explicit Workspace(const OrtApi* api) : api_(api) {}
  ~Workspace() {
    if (memory_ != nullptr) api_->ReleaseStatus(api_->AllocatorFree(allocator_, memory_));
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  OrtStatus* Allocate(OrtKernelContext* context, size_t bytes) {
    if (bytes == 0) return nullptr;
    const OrtValue* x = nullptr;
    const OrtMemoryInfo* info = nullptr;
    OrtStatus* error = api_->KernelContext_GetInput(context, 0, &x);
    if (error == nullptr) error = api_->GetTensorMemoryInfo(x, &info);
    if (error == nullptr) error = api_->KernelContext_GetAllocator(context, info, &allocator_);
    if (error == nullptr) error = api_->AllocatorAlloc(allocator_, bytes, &memory_);
    return error;
  }
  void* memory() const { return memory_; }

 private:
  const OrtApi* api_;
  OrtAllocator* allocator_ = nullptr;
  void* memory_ = nullptr;
};

OrtStatus* ORT_API_CALL Compute(void* kernel, OrtKernelContext* context) {
  const Node& node = *static_cast<const Node*>(kernel);
  const lmkan_dtype dtype = node.op->x_dtype;
  lmkan_table_desc desc;
  Rows rows;
  if (OrtStatus* error = DescribeTableOf(node, context, &desc)) return error;
  if (OrtStatus* error = MapRows(node, context, desc, &rows)) return error;
  if (rows.count == 0) return nullptr;
  void* stream = nullptr;
  if (OrtStatus* error = node.api->KernelContext_GetGPUComputeStream(context, &stream)) {
    return error;
  }

  char message[kMessageSize];
  size_t bytes = 0;
  if (lmkan_cuda_workspace_size(&desc, dtype, rows.count, LMKAN_CUDA_AUTO, &bytes, message,
                                sizeof message) != LMKAN_OK) {
    return Error(node, message);
  }
  Workspace workspace(node.api);
  if (OrtStatus* error = workspace.Allocate(context, bytes)) return error;
  if (lmkan_cuda_lookup2d(&desc, dtype, rows.x, rows.y, rows.count, LMKAN_CUDA_AUTO,
                          workspace.memory(), bytes, stream, message, sizeof message) != LMKAN_OK) {
    return Error(node, message);
  }
  return nullptr;
}

const char* ORT_API_CALL Type(const OrtCustomOp*) { return "CUDAExecutionProvider"; }

}  // namespace

const Provider kCudaProvider = {Type, Create, Compute, Destroy};

}  // namespace lmkan::ort
