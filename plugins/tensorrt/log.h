// Messages to TensorRT's logger. Nothing here throws.
#ifndef LMKAN_TENSORRT_LOG_H_
#define LMKAN_TENSORRT_LOG_H_

#include "NvInferRuntime.h"

namespace lmkan::trt {

// Remembers what TensorRT handed the library; null is ignored.
void SetLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

// Sends one line to the logger of the engine that is calling, or to stderr where there is none.
void LogError(const char* line) noexcept;

}  // namespace lmkan::trt

#endif  // LMKAN_TENSORRT_LOG_H_
