// Entry point that ONNX Runtime looks up by name (SessionOptions.register_custom_ops_library).
#include <cstdio>
#include <iterator>

#include "lookup2d_op.h"
#include "onnxruntime_c_api.h"

namespace {

const lmkan::ort::Provider* const kProviders[] = {
    &lmkan::ort::kCpuProvider,
#if defined(LMKAN_HAVE_CUDA)
    &lmkan::ort::kCudaProvider,
#endif
};

// Older releases complain on stderr when they are asked for a newer API, so their version comes
// first.
lmkan::ort::ShapeReference FindShapeReference(const OrtApiBase* base) {
#if ORT_API_VERSION >= 24
  int major = 0, minor = 0;
  if (std::sscanf(base->GetVersionString(), "%d.%d", &major, &minor) == 2 &&
      (major > 1 || minor >= 24)) {
    const OrtApi* api = base->GetApi(24);
    if (api != nullptr) return api->GetTensorElementTypeAndShapeDataReference;
  }
#else
  static_cast<void>(base);
#endif
  return nullptr;
}

// One domain for all sessions of the process: ONNX Runtime keeps pointers to it and to the
// definitions.
OrtStatus* GetDomain(const OrtApiBase* base, const OrtApi* api, OrtCustomOpDomain** result) {
  using lmkan::ort::kNumLookup2dOps;
  static lmkan::ort::Lookup2dOp ops[std::size(kProviders)][kNumLookup2dOps];
  static OrtCustomOpDomain* domain = nullptr;
  static OrtStatus* const status = [base, api]() -> OrtStatus* {
    const lmkan::ort::Runtime runtime = {api, FindShapeReference(base)};
    if (OrtStatus* error = api->CreateCustomOpDomain("lmkan", &domain)) return error;
    for (size_t p = 0; p < std::size(kProviders); ++p) {
      for (size_t i = 0; i < kNumLookup2dOps; ++i) {
        ops[p][i] = lmkan::ort::MakeLookup2dOp(i, *kProviders[p], runtime);
        if (OrtStatus* error = api->CustomOpDomain_Add(domain, &ops[p][i])) return error;
      }
    }
    return nullptr;
  }();
  *result = domain;
  // The first failure's status belongs to the function; each caller gets one of its own.
  return status == nullptr
             ? nullptr
             : api->CreateStatus(api->GetErrorCode(status), api->GetErrorMessage(status));
}

}  // namespace

extern "C" ORT_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(lmkan::ort::kOrtApiVersion);
  if (api == nullptr) return nullptr;  // ONNX Runtime itself has said that it is too old
  OrtCustomOpDomain* domain = nullptr;
  if (OrtStatus* error = GetDomain(base, api, &domain)) return error;
  return api->AddCustomOpDomain(options, domain);
}
