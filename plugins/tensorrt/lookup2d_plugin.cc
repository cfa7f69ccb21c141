// Checks the tensors, maps them onto the C interface of the CUDA kernels, and calls it on
// TensorRT's stream.
#include "lookup2d_plugin.h"

#include <algorithm>
#include <cstdio>
#include <new>
#include <utility>

#include "lmkan/utf8.h"
#include "log.h"

namespace lmkan::trt {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

namespace {

constexpr int32_t kMaxInputs = 3;

// The kernels' description of the table; its pointers are filled in where there are any.
lmkan_table_desc DescribeTable(const Dims& table, DataType type) {
  return {nullptr, KernelType(type), table.d[0], table.d[1] - 1, table.d[3], nullptr};
}

// A dimension expression's value, or -1 where it depends on the input.
Dims KnownSizes(const DimsExprs& shape) {
  Dims sizes{};
  sizes.nbDims = shape.nbDims;
  for (int32_t i = 0; i < shape.nbDims; ++i) {
    sizes.d[i] = shape.d[i]->isConstant() ? shape.d[i]->getConstantValue() : -1;
  }
  return sizes;
}

}  // namespace

// --- Life
// ----------------------------------------------------------------------------------------

Lookup2dPlugin::Lookup2dPlugin(bool quantized, std::string layer_name)
    : quantized_(quantized),
      layer_name_(std::move(layer_name)),
      layer_name_field_(kLayerNameField, layer_name_.data(), nvinfer1::PluginFieldType::kCHAR,
                        static_cast<int32_t>(layer_name_.size())),
      fields_{layer_name_.empty() ? 0 : 1, &layer_name_field_} {}

Lookup2dPlugin::Lookup2dPlugin(const Lookup2dPlugin& other)
    : Lookup2dPlugin(other.quantized_, other.layer_name_) {
  tactic_ = other.tactic_;
  std::copy(std::begin(other.valid_tactics_), std::end(other.valid_tactics_), valid_tactics_);
  num_valid_tactics_ = other.num_valid_tactics_;
}

nvinfer1::IPluginV3* Lookup2dPlugin::clone() noexcept {
  try {
    return new Lookup2dPlugin(*this);
  } catch (const std::bad_alloc&) {
    Fail({"no memory to clone the plugin"});
    return nullptr;
  }
}

nvinfer1::IPluginV3* Lookup2dPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return clone();
}

nvinfer1::IPluginCapability* Lookup2dPlugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

const char* Lookup2dPlugin::getPluginName() const noexcept { return PluginName(quantized_); }
const char* Lookup2dPlugin::getPluginVersion() const noexcept { return kPluginVersion; }
const char* Lookup2dPlugin::getPluginNamespace() const noexcept { return kPluginNamespace; }

// A newer release may have other kernels, whose times differ.
const char* Lookup2dPlugin::getTimingCacheID() noexcept { return "lmkan-" LMKAN_VERSION; }
const char* Lookup2dPlugin::getMetadataString() noexcept { return "lmkan-deploy " LMKAN_VERSION; }

const nvinfer1::PluginFieldCollection* Lookup2dPlugin::getFieldsToSerialize() noexcept {
  return &fields_;
}

int32_t Lookup2dPlugin::Fail(const Message& message) const noexcept {
  char line[sizeof message.text + 256];
  std::snprintf(line, sizeof line, "%s layer \"%.*s\": %s", getPluginName(),
                NameBytes(layer_name_.c_str()), layer_name_.c_str(), message.text);
  LogError(line);
  return 1;
}

bool Lookup2dPlugin::CheckCounts(int32_t num_inputs, int32_t num_outputs,
                                 Message* message) const noexcept {
  if (num_inputs == NumInputs(quantized_) && num_outputs == 1) return true;
  std::snprintf(message->text, sizeof message->text,
                "expected %d inputs (%s) and 1 output, found %d and %d", NumInputs(quantized_),
                quantized_ ? "x, table, scale" : "x, table", num_inputs, num_outputs);
  return false;
}

bool Lookup2dPlugin::CheckInputs(const PluginTensorDesc* inputs, Message* message) const noexcept {
  DataType types[kMaxInputs];
  Dims shapes[kMaxInputs];
  for (int32_t i = 0; i < NumInputs(quantized_); ++i) {
    types[i] = inputs[i].type;
    shapes[i] = inputs[i].dims;
  }
  return CheckTypes(quantized_, types, message) && CheckShapes(quantized_, shapes, message);
}

// --- Types and shapes
// ----------------------------------------------------------------------------

int32_t Lookup2dPlugin::getNbOutputs() const noexcept { return 1; }

int32_t Lookup2dPlugin::getOutputDataTypes(DataType* output_types, int32_t num_outputs,
                                           const DataType* input_types,
                                           int32_t num_inputs) const noexcept {
  Message message;
  if (!CheckCounts(num_inputs, num_outputs, &message)) return Fail(message);
  if (!CheckTypes(quantized_, input_types, &message)) return Fail(message);
  output_types[0] = input_types[kX];
  return 0;
}

int32_t Lookup2dPlugin::getOutputShapes(const DimsExprs* inputs, int32_t num_inputs,
                                        const DimsExprs*, int32_t, DimsExprs* outputs,
                                        int32_t num_outputs, nvinfer1::IExprBuilder&) noexcept {
  Message message;
  if (!CheckCounts(num_inputs, num_outputs, &message)) return Fail(message);
  Dims shapes[kMaxInputs];
  for (int32_t i = 0; i < num_inputs; ++i) shapes[i] = KnownSizes(inputs[i]);
  if (!CheckShapes(quantized_, shapes, &message)) return Fail(message);

  outputs[0] = inputs[kX];
  outputs[0].d[outputs[0].nbDims - 1] = inputs[kTable].d[3];
  return 0;
}

bool Lookup2dPlugin::supportsFormatCombination(int32_t position,
                                               const DynamicPluginTensorDesc* tensors,
                                               int32_t num_inputs, int32_t num_outputs) noexcept {
  if (num_inputs != NumInputs(quantized_) || num_outputs != 1) return false;
  if (position < 0 || position > num_inputs) return false;
  const PluginTensorDesc& desc = tensors[position].desc;
  return desc.format == nvinfer1::TensorFormat::kLINEAR &&
         IsTypeSupported(quantized_, position, desc.type, tensors[kX].desc.type);
}

// --- Build
// ---------------------------------------------------------------------------------------

int32_t Lookup2dPlugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                        const DynamicPluginTensorDesc*,
                                        int32_t num_outputs) noexcept {
  Message message;
  if (!CheckCounts(num_inputs, num_outputs, &message)) return Fail(message);
  DataType types[kMaxInputs];
  Dims known[kMaxInputs], min[kMaxInputs], max[kMaxInputs];
  for (int32_t i = 0; i < num_inputs; ++i) {
    types[i] = inputs[i].desc.type;
    known[i] = inputs[i].desc.dims;
    min[i] = inputs[i].min;
    max[i] = inputs[i].max;
  }
  if (!CheckTypes(quantized_, types, &message)) return Fail(message);
  for (const Dims* shapes : {known, min, max}) {
    if (!CheckShapes(quantized_, shapes, &message)) return Fail(message);
  }
  // No tactic without a device: TensorRT then uses its default, 0, which is LMKAN_CUDA_AUTO.
  const lmkan_table_desc table = DescribeTable(max[kTable], types[kTable]);
  num_valid_tactics_ = std::min(
      kMaxTactics, lmkan_cuda_tactics(&table, KernelType(types[kX]), valid_tactics_, kMaxTactics));
  return 0;
}

int32_t Lookup2dPlugin::getNbTactics() noexcept { return num_valid_tactics_; }

int32_t Lookup2dPlugin::getValidTactics(int32_t* tactics, int32_t num_tactics) noexcept {
  std::copy_n(valid_tactics_, std::min(num_tactics, num_valid_tactics_), tactics);
  return 0;
}

// Enough for every tactic, because TensorRT asks once for all of them.
size_t Lookup2dPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                                        const DynamicPluginTensorDesc*,
                                        int32_t num_outputs) const noexcept {
  Message message;
  if (!CheckCounts(num_inputs, num_outputs, &message)) {
    Fail(message);
    return 0;
  }
  const lmkan_table_desc table = DescribeTable(inputs[kTable].max, inputs[kTable].desc.type);
  size_t largest = 0;
  for (int32_t i = -1; i < num_valid_tactics_; ++i) {
    const lmkan_cuda_tactic tactic = i < 0 ? LMKAN_CUDA_AUTO : valid_tactics_[i];
    size_t bytes = 0;
    if (lmkan_cuda_workspace_size(&table, KernelType(inputs[kX].desc.type), NumRows(inputs[kX].max),
                                  tactic, &bytes, message.text, sizeof message.text) != LMKAN_OK) {
      Fail(message);  // there is no way to tell TensorRT; enqueue refuses for the same reason
      return 0;
    }
    largest = std::max(largest, bytes);
  }
  return largest;
}

// --- Run
// -----------------------------------------------------------------------------------------

int32_t Lookup2dPlugin::setTactic(int32_t tactic) noexcept {
  tactic_ = tactic;  // the kernels refuse a number that they do not know
  return 0;
}

int32_t Lookup2dPlugin::onShapeChange(const PluginTensorDesc* inputs, int32_t num_inputs,
                                      const PluginTensorDesc*, int32_t num_outputs) noexcept {
  Message message;
  if (!CheckCounts(num_inputs, num_outputs, &message) || !CheckInputs(inputs, &message)) {
    return Fail(message);
  }
  return 0;
}

int32_t Lookup2dPlugin::enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*,
                                const void* const* inputs, void* const* outputs, void* workspace,
                                cudaStream_t stream) noexcept {
  Message message;
  if (!CheckInputs(input_descs, &message)) return Fail(message);
  const PluginTensorDesc& x = input_descs[kX];
  const int64_t rows = NumRows(x.dims);
  if (rows == 0) return 0;
  lmkan_table_desc table = DescribeTable(input_descs[kTable].dims, input_descs[kTable].type);
  table.data = inputs[kTable];
  if (quantized_) table.scales = static_cast<const float*>(inputs[kScale]);

  // TensorRT passes the workspace without its size; it has at least what this many rows need.
  size_t workspace_size = 0;
  const lmkan_dtype dtype = KernelType(x.type);
  if (lmkan_cuda_workspace_size(&table, dtype, rows, tactic_, &workspace_size, message.text,
                                sizeof message.text) != LMKAN_OK ||
      lmkan_cuda_lookup2d(&table, dtype, inputs[kX], outputs[0], rows, tactic_, workspace,
                          workspace_size, stream, message.text, sizeof message.text) != LMKAN_OK) {
    return Fail(message);
  }
  return 0;
}

}  // namespace lmkan::trt
