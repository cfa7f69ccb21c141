// Entry points that TensorRT looks up by name when it loads a plugin library.
#include "NvInferRuntime.h"
#include "log.h"
#include "lookup2d_creator.h"

#define LMKAN_TEXT_OF(number) #number
#define LMKAN_TEXT(number) LMKAN_TEXT_OF(number)
#define LMKAN_EXPORT extern "C" __attribute__((visibility("default")))

// Read from the file, before it is loaded, by lmkan_deploy/runtime/tensorrt_plugin.py.
__attribute__((used)) static const char kVersions[] =
    "lmkan-deploy " LMKAN_VERSION " for TensorRT " LMKAN_TEXT(NV_TENSORRT_MAJOR) "." LMKAN_TEXT(
        NV_TENSORRT_MINOR) "." LMKAN_TEXT(NV_TENSORRT_PATCH);

LMKAN_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& num_creators) {
  static lmkan::trt::Lookup2dCreator lookup2d(false), quantized(true);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&lookup2d, &quantized};
  num_creators = 2;
  return creators;
}

LMKAN_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  lmkan::trt::SetLoggerFinder(finder);
}
