// Entry point that ONNX Runtime looks up by name (SessionOptions.register_custom_ops_library).
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

// One domain for all sessions of the process: ONNX Runtime keeps pointers to it and to the
// definitions.
OrtStatus* GetDomain(const OrtApi* api, OrtCustomOpDomain** result) {
  using lmkan::ort::kNumLookup2dOps;
  static lmkan::ort::Lookup2dOp ops[std::size(kProviders)][kNumLookup2dOps];
  static OrtCustomOpDomain* domain = nullptr;
  static OrtStatus* const status = [api]() -> OrtStatus* {
    if (OrtStatus* error = api->CreateCustomOpDomain("lmkan", &domain)) return error;
    for (size_t p = 0; p < std::size(kProviders); ++p) {
      for (size_t i = 0; i < kNumLookup2dOps; ++i) {
        ops[p][i] = lmkan::ort::MakeLookup2dOp(i, *kProviders[p], api);
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
  if (OrtStatus* error = GetDomain(api, &domain)) return error;
  return api->AddCustomOpDomain(options, domain);
}
