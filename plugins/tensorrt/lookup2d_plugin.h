// The operators LMKAN2D and LMKAN2DQuantized as a TensorRT plugin. README.md has the contract.
#ifndef LMKAN_TENSORRT_LOOKUP2D_PLUGIN_H_
#define LMKAN_TENSORRT_LOOKUP2D_PLUGIN_H_

#include <cstdint>
#include <string>

#include "NvInferRuntime.h"
#include "check_tensors.h"
#include "lmkan/lookup2d_cuda.h"

namespace lmkan::trt {

inline constexpr const char* kPluginVersion = "1";
inline constexpr const char* kPluginNamespace = "lmkan";

// The plugin's only field: the name of its layer, for messages at run time.
inline constexpr const char* kLayerNameField = "layer_name";
inline constexpr int32_t kMaxLayerName = 1024;

constexpr const char* PluginName(bool quantized) {
  return quantized ? "LMKAN2DQuantized" : "LMKAN2D";
}

// Holds nothing but values, so clones share no state. TensorRT uses one object from one thread.
class Lookup2dPlugin final : public nvinfer1::IPluginV3,
                             public nvinfer1::IPluginV3OneCore,
                             public nvinfer1::IPluginV3OneBuild,
                             public nvinfer1::IPluginV3OneRuntime {
 public:
  Lookup2dPlugin(bool quantized, std::string layer_name);
  Lookup2dPlugin(const Lookup2dPlugin& other);
  Lookup2dPlugin& operator=(const Lookup2dPlugin&) = delete;

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs,
                             const nvinfer1::DataType* input_types,
                             int32_t num_inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t num_shape_inputs,
                          nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t num_inputs, int32_t num_outputs) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t num_outputs) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t num_outputs) const noexcept override;
  int32_t getNbTactics() noexcept override;
  int32_t getValidTactics(int32_t* tactics, int32_t num_tactics) noexcept override;
  const char* getTimingCacheID() noexcept override;
  const char* getMetadataString() noexcept override;

  // IPluginV3OneRuntime
  int32_t setTactic(int32_t tactic) noexcept override;
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, int32_t num_inputs,
                        const nvinfer1::PluginTensorDesc* outputs,
                        int32_t num_outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs,
                  const nvinfer1::PluginTensorDesc* output_descs, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

 private:
  static constexpr int32_t kMaxTactics = 16;

  // Logs the message with the layer's name; returns TensorRT's status of a failure.
  int32_t Fail(const Message& message) const noexcept;
  bool CheckCounts(int32_t num_inputs, int32_t num_outputs, Message* message) const noexcept;
  bool CheckInputs(const nvinfer1::PluginTensorDesc* inputs, Message* message) const noexcept;

  const bool quantized_;
  const std::string layer_name_;
  nvinfer1::PluginField layer_name_field_;
  nvinfer1::PluginFieldCollection fields_;

  lmkan_cuda_tactic tactic_ = LMKAN_CUDA_AUTO;
  lmkan_cuda_tactic valid_tactics_[kMaxTactics] = {};  // for the last configuration
  int32_t num_valid_tactics_ = 0;
};

}  // namespace lmkan::trt

#endif  // LMKAN_TENSORRT_LOOKUP2D_PLUGIN_H_
