#include "node.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <new>

#include "lmkan/utf8.h"

namespace lmkan::ort {
namespace {

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

OrtStatus* CheckRank(const Node& node, const char* name, size_t rank) {
  if (rank <= kMaxRank) return nullptr;
  char text[kMessageSize];
  std::snprintf(
      text, sizeof text,
      "expected %s of rank %zu at most, found rank %zu; flatten leading axes before the layer",
      name, kMaxRank, rank);
  return Error(node, text);
}

OrtStatus* CopyDims(const Node& node, const char* name, const OrtValue* value, Shape* shape) {
  const OrtApi* api = node.api;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* error = api->GetTensorTypeAndShape(value, &info)) return error;
  OrtStatus* error = api->GetDimensionsCount(info, &shape->rank);
  if (error == nullptr) error = CheckRank(node, name, shape->rank);
  if (error == nullptr) error = api->GetDimensions(info, shape->dims, shape->rank);
  api->ReleaseTensorTypeAndShapeInfo(info);
  return error;
}

OrtStatus* ReadDims(const Node& node, const char* name, const OrtValue* value, Shape* shape) {
  ONNXTensorElementDataType type;
  const int64_t* dims = nullptr;
  if (OrtStatus* error = node.op->runtime.shape_reference(value, &type, &dims, &shape->rank)) {
    return error;
  }
  if (OrtStatus* error = CheckRank(node, name, shape->rank)) return error;
  std::copy_n(dims, shape->rank, shape->dims);
  return nullptr;
}

OrtStatus* GetShape(const Node& node, const char* name, const OrtValue* value, Shape* shape) {
  const bool in_place = node.op->runtime.shape_reference != nullptr;
  if (OrtStatus* error =
          in_place ? ReadDims(node, name, value, shape) : CopyDims(node, name, value, shape)) {
    return error;
  }
  shape->count = 1;
  for (size_t i = 0; i < shape->rank; ++i) shape->count *= shape->dims[i];
  return nullptr;
}

// The C API has no read-only access; nothing is written through the pointer.
OrtStatus* GetData(const Node& node, const OrtValue* value, const void** data) {
  void* memory = nullptr;
  OrtStatus* error = node.api->GetTensorMutableData(const_cast<OrtValue*>(value), &memory);
  *data = memory;
  return error;
}

OrtStatus* DescribeScale(const Node& node, const OrtValue* value, lmkan_table_desc* desc) {
  Shape shape;
  if (OrtStatus* error = GetShape(node, "scale", value, &shape)) return error;
  if (shape.rank != 2 || shape.dims[0] != desc->num_pairs || shape.dims[1] != desc->num_outputs) {
    char found[160], text[kMessageSize];
    shape.Format(found, sizeof found);
    std::snprintf(text, sizeof text,
                  "expected scale [%lld, %lld], the table's pairs and outputs, found %s; export "
                  "the model again",
                  static_cast<long long>(desc->num_pairs),
                  static_cast<long long>(desc->num_outputs), found);
    return Error(node, text);
  }
  const void* data = nullptr;
  OrtStatus* error = GetData(node, value, &data);
  desc->scales = static_cast<const float*>(data);
  return error;
}

OrtStatus* ReadName(const OrtApi* api, const OrtKernelInfo* info, std::string* name) {
  size_t size = 0;
  if (OrtStatus* error = api->KernelInfo_GetNodeName(info, nullptr, &size)) return error;
  std::unique_ptr<char[]> text(new (std::nothrow) char[size + 1]());
  if (text == nullptr) return api->CreateStatus(ORT_FAIL, "no memory for a node name");
  if (OrtStatus* error = api->KernelInfo_GetNodeName(info, text.get(), &size)) return error;
  name->assign(text.get());
  return nullptr;
}

OrtStatus* CheckX(const Node& node, const Shape& x, const lmkan_table_desc& desc) {
  const int64_t features = 2 * desc.num_pairs;
  if (x.rank >= 1 && x.dims[x.rank - 1] == features) return nullptr;
  char found[160], text[kMessageSize];
  x.Format(found, sizeof found);
  std::snprintf(
      text, sizeof text,
      "expected x [..., %lld] because the table has %lld pairs of features, found %s; give x "
      "%lld features, or export the model again",
      static_cast<long long>(features), static_cast<long long>(desc.num_pairs), found,
      static_cast<long long>(features));
  return Error(node, text);
}

}  // namespace

OrtStatus* ReadNode(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                    Node* node) {
  node->op = &Self(op);
  node->api = api;
  return ReadName(api, info, &node->name);
}

OrtStatus* Error(const Node& node, const char* message) {
  char text[kMessageSize + 256];
  std::snprintf(text, sizeof text, "%s node \"%.*s\": %s", node.op->name(),
                NameBytes(node.name.c_str()), node.name.c_str(), message);
  return node.api->CreateStatus(ORT_INVALID_ARGUMENT, text);
}

OrtStatus* DescribeTable(const Node& node, const OrtValue* value, const OrtValue* scale,
                         lmkan_table_desc* desc) {
  Shape shape;
  if (OrtStatus* error = GetShape(node, "table", value, &shape)) return error;
  if (shape.rank != 4 || shape.dims[1] != shape.dims[2] || shape.dims[1] < 4 || shape.dims[0] < 1 ||
      shape.dims[3] < 1) {
    char found[160], text[kMessageSize];
    shape.Format(found, sizeof found);
    std::snprintf(text, sizeof text,
                  "expected table [pairs, G+1, G+1, outputs] with equal grid axes, G >= 3 and at "
                  "least 1 pair and 1 output, found %s; export the model again",
                  found);
    return Error(node, text);
  }
  const void* data = nullptr;
  if (OrtStatus* error = GetData(node, value, &data)) return error;
  *desc = {data, node.op->table_dtype, shape.dims[0], shape.dims[1] - 1, shape.dims[3], nullptr};
  return scale == nullptr ? nullptr : DescribeScale(node, scale, desc);
}

OrtStatus* DescribeTableOf(const Node& node, OrtKernelContext* context, lmkan_table_desc* desc) {
  const OrtValue* constants[2] = {};
  for (size_t i = 0; i < node.num_constants(); ++i) {
    if (OrtStatus* error = node.api->KernelContext_GetInput(context, i + 1, &constants[i])) {
      return error;
    }
  }
  return DescribeTable(node, constants[0], constants[1], desc);
}

OrtStatus* MapRows(const Node& node, OrtKernelContext* context, const lmkan_table_desc& desc,
                   Rows* rows) {
  const OrtValue* x = nullptr;
  OrtValue* y = nullptr;
  Shape shape;
  if (OrtStatus* error = node.api->KernelContext_GetInput(context, 0, &x)) return error;
  if (OrtStatus* error = GetShape(node, "x", x, &shape)) return error;
  if (OrtStatus* error = CheckX(node, shape, desc)) return error;
  rows->count = shape.count / (2 * desc.num_pairs);
  shape.dims[shape.rank - 1] = desc.num_outputs;
  if (OrtStatus* error =
          node.api->KernelContext_GetOutput(context, 0, shape.dims, shape.rank, &y)) {
    return error;
  }
  if (rows->count == 0) return nullptr;
  if (OrtStatus* error = GetData(node, x, &rows->x)) return error;
  return node.api->GetTensorMutableData(y, &rows->y);
}

}  // namespace lmkan::ort
