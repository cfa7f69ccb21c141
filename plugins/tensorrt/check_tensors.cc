#include "check_tensors.h"

#include <cstdarg>
#include <cstdio>

namespace lmkan::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
bool Refuse(Message* message, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(message->text, sizeof message->text, format, values);
  va_end(values);
  return false;
}

// "[8, 12]"; "?" is a size that is not known yet.
struct ShapeText {
  explicit ShapeText(const Dims& shape) {
    size_t used = Append(0, "[");
    for (int32_t i = 0; i < shape.nbDims && i < Dims::MAX_DIMS; ++i) {
      if (i > 0) used = Append(used, ", ");
      if (shape.d[i] < 0) {
        used = Append(used, "?");
      } else {
        char digits[24];
        std::snprintf(digits, sizeof digits, "%lld", static_cast<long long>(shape.d[i]));
        used = Append(used, digits);
      }
    }
    Append(used, "]");
  }

  char text[200];  // eight sizes of 20 digits fit

 private:
  size_t Append(size_t used, const char* part) {
    const int written = std::snprintf(text + used, sizeof text - used, "%s", part);
    return used + static_cast<size_t>(written);
  }
};

const char* TypeName(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return "float32";
    case DataType::kHALF:
      return "float16";
    case DataType::kBF16:
      return "bfloat16";
    case DataType::kINT8:
      return "int8";
    case DataType::kINT32:
      return "int32";
    case DataType::kINT64:
      return "int64";
    case DataType::kBOOL:
      return "bool";
    case DataType::kUINT8:
      return "uint8";
    default:
      return "another type";
  }
}

bool IsFloat(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

bool Differ(int64_t a, int64_t b) { return a >= 0 && b >= 0 && a != b; }
bool IsBelow(int64_t size, int64_t least) { return size >= 0 && size < least; }

bool IsTable(const Dims& table) {
  return table.nbDims == 4 && !IsBelow(table.d[0], 1) && !IsBelow(table.d[1], 4) &&
         !IsBelow(table.d[2], 4) && !Differ(table.d[1], table.d[2]) && !IsBelow(table.d[3], 1);
}

}  // namespace

bool IsTypeSupported(bool quantized, int32_t position, DataType type, DataType x_type) {
  if (position == kX) return IsFloat(type);
  if (position == kTable) return quantized ? type == DataType::kINT8 : IsFloat(type);
  if (quantized && position == kScale) return type == DataType::kFLOAT;
  return type == x_type;
}

lmkan_dtype KernelType(DataType type) {
  switch (type) {
    case DataType::kHALF:
      return LMKAN_FLOAT16;
    case DataType::kBF16:
      return LMKAN_BFLOAT16;
    case DataType::kINT8:
      return LMKAN_INT8;
    default:
      return LMKAN_FLOAT32;
  }
}

bool CheckTypes(bool quantized, const DataType* types, Message* message) {
  constexpr const char* kNames[] = {"x", "table", "scale"};
  for (int32_t i = 0; i < NumInputs(quantized); ++i) {
    if (IsTypeSupported(quantized, i, types[i], types[kX])) continue;
    const char* expected = "float32, float16 or bfloat16";
    if (quantized && i == kTable) expected = "int8";
    if (quantized && i == kScale) expected = "float32";
    return Refuse(message, "expected %s of type %s, found %s", kNames[i], expected,
                  TypeName(types[i]));
  }
  return true;
}

bool CheckShapes(bool quantized, const Dims* shapes, Message* message) {
  const Dims& x = shapes[kX];
  const Dims& table = shapes[kTable];
  if (!IsTable(table)) {
    return Refuse(message,
                  "expected table [pairs, G+1, G+1, outputs] with equal grid axes, G >= 3 and at "
                  "least 1 pair and 1 output, found %s",
                  ShapeText(table).text);
  }
  const int64_t features = x.nbDims >= 1 ? x.d[x.nbDims - 1] : 0;
  if (x.nbDims < 1 || IsBelow(features, 2) || (features >= 0 && features % 2 != 0)) {
    return Refuse(message, "expected x [..., features] with an even number of features, found %s",
                  ShapeText(x).text);
  }
  if (table.d[0] >= 0 && Differ(features, 2 * table.d[0])) {
    return Refuse(message,
                  "expected x [..., %lld] because the table has %lld pairs of features, found %s",
                  static_cast<long long>(2 * table.d[0]), static_cast<long long>(table.d[0]),
                  ShapeText(x).text);
  }
  if (!quantized) return true;
  const Dims& scale = shapes[kScale];
  if (scale.nbDims != 2 || Differ(scale.d[0], table.d[0]) || Differ(scale.d[1], table.d[3])) {
    Dims expected{};
    expected.nbDims = 2;
    expected.d[0] = table.d[0];
    expected.d[1] = table.d[3];
    return Refuse(message, "expected scale %s, the table's pairs and outputs, found %s",
                  ShapeText(expected).text, ShapeText(scale).text);
  }
  return true;
}

int64_t NumRows(const Dims& x) {
  int64_t rows = 1;
  for (int32_t i = 0; i + 1 < x.nbDims; ++i) rows *= x.d[i];
  return rows;
}

}  // namespace lmkan::trt
