// Compares the types and shapes of a layer's tensors with the operator's contract.
#ifndef LMKAN_TENSORRT_CHECK_TENSORS_H_
#define LMKAN_TENSORRT_CHECK_TENSORS_H_

#include <cstddef>
#include <cstdint>

#include "NvInferRuntime.h"
#include "lmkan/lookup2d.h"

namespace lmkan::trt {

inline constexpr int32_t kX = 0;
inline constexpr int32_t kTable = 1;
inline constexpr int32_t kScale = 2;  // of the quantized operator alone

// Where a line is written that says what was expected and what was found.
struct Message {
  char text[512];
};

// The operator's inputs: x and table, and scale where the table is quantized. There is one output.
constexpr int32_t NumInputs(bool quantized) { return quantized ? 3 : 2; }

// Whether the operator takes the type at a position: inputs first, then y, which has x's type.
bool IsTypeSupported(bool quantized, int32_t position, nvinfer1::DataType type,
                     nvinfer1::DataType x_type);

// The kernels' name of a supported type.
lmkan_dtype KernelType(nvinfer1::DataType type);

// Checks NumInputs(quantized) types; on false the message is written.
bool CheckTypes(bool quantized, const nvinfer1::DataType* types, Message* message);

// Checks NumInputs(quantized) shapes; a negative size is one that is not known yet and fits. On
// false the message is written.
bool CheckShapes(bool quantized, const nvinfer1::Dims* shapes, Message* message);

// Product of the leading sizes of x.
int64_t NumRows(const nvinfer1::Dims& x);

}  // namespace lmkan::trt

#endif  // LMKAN_TENSORRT_CHECK_TENSORS_H_
