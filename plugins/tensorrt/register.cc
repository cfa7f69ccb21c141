// Entry points that TensorRT looks up by name when it loads a plugin library.
#include "NvInferRuntime.h"
#include "log.h"
#include "lookup2d_creator.h"

#define LMKAN_EXPORT extern "C" __attribute__((visibility("default")))

LMKAN_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& num_creators) {
  static lmkan::trt::Lookup2dCreator lookup2d(false), quantized(true);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&lookup2d, &quantized};
  num_creators = 2;
  return creators;
}

LMKAN_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  lmkan::trt::SetLoggerFinder(finder);
}
