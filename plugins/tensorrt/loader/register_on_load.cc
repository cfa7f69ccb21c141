// For programs that only open a plugin library (Triton's plugins= option, LD_PRELOAD, trtexec
// --staticPlugins) and expect it to register itself: has TensorRT load the plugin beside this file,
// NAME.so beside NAME_register.so. The plugin must not do so itself, because loadLibrary refuses
// plugins that are registered already.
#include <dlfcn.h>

#include <cstdio>
#include <string>

#include "NvInferRuntime.h"

#define LMKAN_TEXT_OF(number) #number
#define LMKAN_TEXT(number) LMKAN_TEXT_OF(number)
#ifndef LMKAN_TENSORRT_LIBRARY  // a test sets another
#define LMKAN_TENSORRT_LIBRARY "libnvinfer.so." LMKAN_TEXT(NV_TENSORRT_MAJOR)
#endif

namespace {

std::string PathOfPlugin() {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&PathOfPlugin), &info) == 0) return "";
  std::string path = info.dli_fname;
  const size_t suffix = path.rfind("_register.so");
  return suffix == std::string::npos ? "" : path.erase(suffix) + ".so";
}

__attribute__((constructor)) void Register() noexcept {
  // The TensorRT that the process has, whose symbols need not be visible from here.
  void* tensorrt = dlopen(LMKAN_TENSORRT_LIBRARY, RTLD_LAZY | RTLD_NOLOAD);
  using GetRegistry = nvinfer1::IPluginRegistry* (*)();
  GetRegistry get_registry = nullptr;
  if (tensorrt != nullptr) {
    get_registry = reinterpret_cast<GetRegistry>(dlsym(tensorrt, "getPluginRegistry"));
  }
  if (get_registry == nullptr) {
    std::fprintf(stderr,
                 "lmkan: expected a process with %s, found none; load the plugin after TensorRT\n",
                 LMKAN_TENSORRT_LIBRARY);
    return;
  }
  const std::string path = PathOfPlugin();
  if (get_registry()->loadLibrary(path.c_str()) == nullptr) {
    std::fprintf(stderr, "lmkan: expected TensorRT to load \"%s\", but it refused; see its log\n",
                 path.c_str());
  }
}

}  // namespace
