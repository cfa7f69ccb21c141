#include "lookup2d_creator.h"

#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "check_tensors.h"
#include "lmkan/utf8.h"
#include "log.h"
#include "lookup2d_plugin.h"

namespace lmkan::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

bool CheckField(const PluginField& field, Message* message) {
  const char* name = field.name == nullptr ? "" : field.name;
  if (std::strcmp(name, kLayerNameField) != 0) {
    std::snprintf(message->text, sizeof message->text,
                  "expected no field other than %s, found \"%.160s\"", kLayerNameField, name);
    return false;
  }
  if (field.type != PluginFieldType::kCHAR || field.data == nullptr || field.length < 1 ||
      field.length > kMaxLayerName) {
    std::snprintf(message->text, sizeof message->text,
                  "expected the field %s to hold 1 to %d characters (type %d), found length %d of "
                  "type %d%s",
                  kLayerNameField, kMaxLayerName, static_cast<int>(PluginFieldType::kCHAR),
                  field.length, static_cast<int>(field.type),
                  field.data == nullptr ? " without data" : "");
    return false;
  }
  return true;
}

}  // namespace

Lookup2dCreator::Lookup2dCreator(bool quantized) : quantized_(quantized) {}

nvinfer1::IPluginV3* Lookup2dCreator::createPlugin(const char* name,
                                                   const nvinfer1::PluginFieldCollection* fields,
                                                   nvinfer1::TensorRTPhase) noexcept {
  Message message;
  try {
    std::string layer_name = name == nullptr ? "" : name;
    bool valid = true;
    for (int32_t i = 0; valid && fields != nullptr && i < fields->nbFields; ++i) {
      const PluginField& field = fields->fields[i];
      valid = CheckField(field, &message);
      if (valid) {
        layer_name.assign(static_cast<const char*>(field.data), static_cast<size_t>(field.length));
      }
    }
    if (valid) {
      layer_name.resize(Utf8Prefix(layer_name.c_str(), kMaxLayerName));
      return new Lookup2dPlugin(quantized_, std::move(layer_name));
    }
  } catch (const std::bad_alloc&) {
    std::snprintf(message.text, sizeof message.text, "no memory to create the plugin");
  }
  char line[sizeof message.text + 256];
  if (name == nullptr) name = "";
  std::snprintf(line, sizeof line, "%s layer \"%.*s\": %s", getPluginName(), NameBytes(name), name,
                message.text);
  LogError(line);
  return nullptr;
}

const nvinfer1::PluginFieldCollection* Lookup2dCreator::getFieldNames() noexcept {
  return &needed_fields_;
}

const char* Lookup2dCreator::getPluginName() const noexcept { return PluginName(quantized_); }
const char* Lookup2dCreator::getPluginVersion() const noexcept { return kPluginVersion; }
const char* Lookup2dCreator::getPluginNamespace() const noexcept { return kPluginNamespace; }

}  // namespace lmkan::trt
