// Stands for libnvinfer.so where a test wants to see what is loaded into its plugin registry.
#include <dlfcn.h>

#include <cstdio>

#include "NvInferRuntime.h"

namespace {

using namespace nvinfer1;

class Registry final : public IPluginRegistry {
 public:
  PluginLibraryHandle loadLibrary(const char* path) noexcept override {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr || dlsym(library, "getCreators") == nullptr) return nullptr;
    std::printf("loadLibrary %s\n", path);
    std::fflush(stdout);
    return library;
  }

#if NV_TENSORRT_MAJOR < 11
  bool registerCreator(IPluginCreator&, const char*) noexcept override { return false; }
  IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
  IPluginCreator* getPluginCreator(const char*, const char*, const char*) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(const IPluginCreator&) noexcept override { return false; }
#endif
  void setErrorRecorder(IErrorRecorder*) noexcept override {}
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool) override {}
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  bool registerCreator(IPluginCreatorInterface&, const char*) noexcept override { return false; }
  IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override {
    return nullptr;
  }
  IPluginCreatorInterface* getCreator(const char*, const char*, const char*) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(const IPluginCreatorInterface&) noexcept override { return false; }
  IPluginResource* acquirePluginResource(const char*, IPluginResource*) noexcept override {
    return nullptr;
  }
  int32_t releasePluginResource(const char*) noexcept override { return 0; }
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override {
    return nullptr;
  }
};

}  // namespace

extern "C" IPluginRegistry* getPluginRegistry() noexcept {
  static Registry registry;
  return &registry;
}
