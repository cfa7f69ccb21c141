// C functions around a plugin library's virtual methods, so that tests/tensorrt_driver.py can
// call them as TensorRT does: TensorRT's Python bindings cannot call the methods of a C++ plugin.
// TensorRT's structures are plain data, which ctypes mirrors.
#include <dlfcn.h>

#include <list>

#include "NvInferRuntime.h"

namespace {

using namespace nvinfer1;

// --- TensorRT's side
// -----------------------------------------------------------------------------

using LogLine = void (*)(int32_t severity, const char* line);

class Logger final : public ILogger, public ILoggerFinder {
 public:
  void log(Severity severity, const char* line) noexcept override {
    log_line(static_cast<int32_t>(severity), line);
  }
  ILogger* findLogger() override { return log_line == nullptr ? nullptr : this; }

  LogLine log_line = nullptr;
};

// A dimension: its size, or -1 where TensorRT knows only that it has one.
class Dimension final : public IDimensionExpr, public apiv::VDimensionExpr {
 public:
  explicit Dimension(int64_t size) : size_(size) { mImpl = this; }
  bool isConstant() const override { return size_ >= 0; }
  int64_t getConstantValue() const override { return size_; }
  bool isSizeTensor() const override { return false; }

 private:
  int64_t size_;
};

// The plugin's output has its inputs' dimensions: it needs no expression of its own.
class Builder final : public IExprBuilder, public apiv::VExprBuilder {
 public:
  Builder() { mImpl = this; }
  IDimensionExpr const* constant(int64_t) override { return nullptr; }
  IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&,
                                  IDimensionExpr const&) override {
    return nullptr;
  }
  IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&,
                                          IDimensionExpr const&) override {
    return nullptr;
  }
};

IPluginV3OneCore* Core(IPluginV3* plugin) {
  return static_cast<IPluginV3OneCore*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
}
IPluginV3OneBuild* Build(IPluginV3* plugin) {
  return static_cast<IPluginV3OneBuild*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}
IPluginV3OneRuntime* Runtime(IPluginV3* plugin) {
  return static_cast<IPluginV3OneRuntime*>(
      plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

Logger logger;

}  // namespace

// --- What the tests call
// -------------------------------------------------------------------------

extern "C" {

// Returns the library's creators, or null where it or an entry point is missing.
IPluginCreatorInterface* const* driver_load(const char* path, int32_t* count) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return nullptr;
  auto get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(
      dlsym(library, "getCreators"));
  auto set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  if (get == nullptr || set == nullptr) return nullptr;
  set(&logger);
  return get(*count);
}

// Where the lines of all libraries go from now on; null for no logger.
void driver_log_to(LogLine log_line) { logger.log_line = log_line; }

IPluginV3* driver_create(IPluginCreatorInterface* creator, const char* name,
                         const PluginFieldCollection* fields, int32_t phase) {
  return static_cast<IPluginCreatorV3One*>(creator)->createPlugin(
      name, fields, static_cast<TensorRTPhase>(phase));
}

void driver_destroy(IPluginV3* plugin) { delete plugin; }
IPluginV3* driver_clone(IPluginV3* plugin) { return plugin->clone(); }
IPluginV3* driver_attach(IPluginV3* plugin) { return Runtime(plugin)->attachToContext(nullptr); }
const char* driver_name(IPluginV3* plugin) { return Core(plugin)->getPluginName(); }
int32_t driver_has_capability(IPluginV3* plugin, int32_t type) {
  return plugin->getCapabilityInterface(static_cast<PluginCapabilityType>(type)) != nullptr;
}

int32_t driver_output_types(IPluginV3* plugin, DataType* outputs, int32_t num_outputs,
                            const DataType* inputs, int32_t num_inputs) {
  return Build(plugin)->getOutputDataTypes(outputs, num_outputs, inputs, num_inputs);
}

int32_t driver_output_shapes(IPluginV3* plugin, const Dims* inputs, int32_t num_inputs,
                             Dims* outputs, int32_t num_outputs) {
  std::list<Dimension> sizes;  // stay where they are
  DimsExprs input_exprs[8] = {}, output_exprs[8] = {};
  for (int32_t i = 0; i < num_inputs; ++i) {
    input_exprs[i].nbDims = inputs[i].nbDims;
    for (int32_t k = 0; k < inputs[i].nbDims; ++k) {
      input_exprs[i].d[k] = &sizes.emplace_back(inputs[i].d[k]);
    }
  }
  Builder builder;
  const int32_t status = Build(plugin)->getOutputShapes(input_exprs, num_inputs, nullptr, 0,
                                                        output_exprs, num_outputs, builder);
  for (int32_t i = 0; status == 0 && i < num_outputs; ++i) {
    outputs[i].nbDims = output_exprs[i].nbDims;
    for (int32_t k = 0; k < outputs[i].nbDims; ++k) {
      outputs[i].d[k] = output_exprs[i].d[k]->getConstantValue();
    }
  }
  return status;
}

int32_t driver_supports(IPluginV3* plugin, int32_t position, const DynamicPluginTensorDesc* tensors,
                        int32_t num_inputs, int32_t num_outputs) {
  return Build(plugin)->supportsFormatCombination(position, tensors, num_inputs, num_outputs);
}

int32_t driver_configure(IPluginV3* plugin, const DynamicPluginTensorDesc* tensors,
                         int32_t num_inputs, int32_t num_outputs) {
  return Build(plugin)->configurePlugin(tensors, num_inputs, tensors + num_inputs, num_outputs);
}

size_t driver_workspace_size(IPluginV3* plugin, const DynamicPluginTensorDesc* tensors,
                             int32_t num_inputs, int32_t num_outputs) {
  return Build(plugin)->getWorkspaceSize(tensors, num_inputs, tensors + num_inputs, num_outputs);
}

int32_t driver_num_tactics(IPluginV3* plugin) { return Build(plugin)->getNbTactics(); }
int32_t driver_tactics(IPluginV3* plugin, int32_t* tactics, int32_t count) {
  return Build(plugin)->getValidTactics(tactics, count);
}

int32_t driver_set_tactic(IPluginV3* plugin, int32_t tactic) {
  return Runtime(plugin)->setTactic(tactic);
}

int32_t driver_shape_change(IPluginV3* plugin, const PluginTensorDesc* tensors, int32_t num_inputs,
                            int32_t num_outputs) {
  return Runtime(plugin)->onShapeChange(tensors, num_inputs, tensors + num_inputs, num_outputs);
}

int32_t driver_enqueue(IPluginV3* plugin, const PluginTensorDesc* tensors, int32_t num_inputs,
                       const void* const* inputs, void* const* outputs, void* workspace,
                       void* stream) {
  return Runtime(plugin)->enqueue(tensors, tensors + num_inputs, inputs, outputs, workspace,
                                  static_cast<cudaStream_t>(stream));
}

const PluginFieldCollection* driver_fields(IPluginV3* plugin) {
  return Runtime(plugin)->getFieldsToSerialize();
}

}  // extern "C"
