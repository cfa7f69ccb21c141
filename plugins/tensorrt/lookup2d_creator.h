// Makes the plugin of an operator from a node's fields, or from those that an engine has kept.
#ifndef LMKAN_TENSORRT_LOOKUP2D_CREATOR_H_
#define LMKAN_TENSORRT_LOOKUP2D_CREATOR_H_

#include "NvInferRuntime.h"

namespace lmkan::trt {

class Lookup2dCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Lookup2dCreator(bool quantized);

  nvinfer1::IPluginV3* createPlugin(const char* name, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override;
  const char* getPluginName() const noexcept override;
  const char* getPluginVersion() const noexcept override;
  const char* getPluginNamespace() const noexcept override;

 private:
  const bool quantized_;
  // None: TensorRT's parser warns of every field that a node lacks.
  const nvinfer1::PluginFieldCollection needed_fields_{0, nullptr};
};

}  // namespace lmkan::trt

#endif  // LMKAN_TENSORRT_LOOKUP2D_CREATOR_H_
