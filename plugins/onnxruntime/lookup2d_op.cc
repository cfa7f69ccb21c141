#include "lookup2d_op.h"

namespace lmkan::ort {
namespace {

// Indexed by lmkan_dtype.
constexpr ONNXTensorElementDataType kOnnxTypes[4] = {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8};

ONNXTensorElementDataType InputType(const Lookup2dOp& op, size_t index) {
  return index == 2 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                    : kOnnxTypes[index == 0 ? op.x_dtype : op.table_dtype];
}

constexpr size_t kMaxRank = 16;

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

// ONNX Runtime would take an unknown size without a name for the size -1, and compute with it.
bool IsSayable(const KnownShape& shape) {
  for (size_t i = 0; i < shape.rank; ++i) {
    const bool has_name = shape.names[i] != nullptr && shape.names[i][0] != '\0';
    if (shape.dims[i] < 0 && !has_name) return false;
  }
  return true;
}

// ONNX Runtime calls the first definition's function for all of them, so the type is x's, not op's.
// y has x's dimensions, the last one replaced by the table's last. Nothing is said where a rank (0
// here) or a size is unknown; mistakes are reported by the computation, which knows the node's
// name.
OrtStatus* ORT_API_CALL InferShape(const OrtCustomOp* op, OrtShapeInferContext* context) {
  const OrtApi* api = Self(op).runtime.api;
  KnownShape x, table;
  if (OrtStatus* error = GetKnownShape(api, context, 0, &x)) return error;
  if (OrtStatus* error = GetKnownShape(api, context, 1, &table)) return error;
  if (x.rank == 0 || table.rank != 4) return nullptr;

  x.dims[x.rank - 1] = table.dims[3];
  x.names[x.rank - 1] = table.names[3];
  if (!IsSayable(x)) return nullptr;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* error = api->CreateTensorTypeAndShapeInfo(&info)) return error;
  OrtStatus* error = api->SetTensorElementType(info, x.type);
  if (error == nullptr) error = api->SetDimensions(info, x.dims, x.rank);
  if (error == nullptr) error = api->SetSymbolicDimensions(info, x.names, x.rank);
  if (error == nullptr) error = api->ShapeInferContext_SetOutputTypeShape(context, 0, info);
  api->ReleaseTensorTypeAndShapeInfo(info);
  return error;
}

}  // namespace

Lookup2dOp MakeLookup2dOp(size_t index, const Provider& provider, const Runtime& runtime) {
  Lookup2dOp op = {};
  op.version = kOrtApiVersion;
  op.x_dtype = static_cast<lmkan_dtype>(index % 3);
  op.table_dtype = static_cast<lmkan_dtype>(index / 3);
  op.runtime = runtime;
  op.GetName = [](const OrtCustomOp* self) { return Self(self).name(); };
  op.GetExecutionProviderType = provider.type;
  op.GetInputTypeCount = [](const OrtCustomOp* self) -> size_t {
    return Self(self).is_quantized() ? 3 : 2;
  };
  op.GetInputType = [](const OrtCustomOp* self, size_t input) {
    return InputType(Self(self), input);
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp* self, size_t) { return kOnnxTypes[Self(self).x_dtype]; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = provider.create;
  op.KernelComputeV2 = provider.compute;
  op.KernelDestroy = provider.destroy;
  op.InferOutputShapeFn = InferShape;
  return op;
}

}  // namespace lmkan::ort
