// The operators LMKAN2D and LMKAN2DQuantized as ONNX Runtime sees them: names, types, shapes. What
// computes them is in lookup2d_cpu.cc and lookup2d_cuda.cc.
#ifndef LMKAN_ONNXRUNTIME_LOOKUP2D_OP_H_
#define LMKAN_ONNXRUNTIME_LOOKUP2D_OP_H_

#include <cstddef>
#include <cstdint>

#include "lmkan/lookup2d.h"
#include "onnxruntime_c_api.h"

namespace lmkan::ort {

// ONNX Runtime 1.17 brought the last functions used here (ParallelFor, shape inference).
inline constexpr uint32_t kOrtApiVersion = 17;

// Shows a tensor's type and shape where they lie. Copying them instead takes several allocations.
using ShapeReference = OrtStatusPtr(ORT_API_CALL*)(const OrtValue* value,
                                                   ONNXTensorElementDataType* type,
                                                   const int64_t** dims, size_t* rank);

// What the operators use of ONNX Runtime.
struct Runtime {
  const OrtApi* api;
  ShapeReference shape_reference;  // null before ONNX Runtime 1.24
};

// A definition, followed by what the callbacks need.
struct Lookup2dOp : OrtCustomOp {
  lmkan_dtype x_dtype;
  lmkan_dtype table_dtype;
  Runtime runtime;

  bool is_quantized() const { return table_dtype == LMKAN_INT8; }
  const char* name() const { return is_quantized() ? "LMKAN2DQuantized" : "LMKAN2D"; }
};

inline const Lookup2dOp& Self(const OrtCustomOp* op) { return *static_cast<const Lookup2dOp*>(op); }

// What runs the nodes of one execution provider.
struct Provider {
  const char*(ORT_API_CALL* type)(const OrtCustomOp*);  // returns null for the CPU
  OrtStatusPtr(ORT_API_CALL* create)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*,
                                     void** kernel);
  OrtStatusPtr(ORT_API_CALL* compute)(void* kernel, OrtKernelContext* context);
  void(ORT_API_CALL* destroy)(void* kernel);
};

extern const Provider kCpuProvider;
#if defined(LMKAN_HAVE_CUDA)
extern const Provider kCudaProvider;
#endif

// One definition for every pair of types of x and table: nine of LMKAN2D, then three of
// LMKAN2DQuantized.
inline constexpr size_t kNumLookup2dOps = 12;

// Definition `index`, 0 ... kNumLookup2dOps - 1.
Lookup2dOp MakeLookup2dOp(size_t index, const Provider& provider, const Runtime& runtime);

}  // namespace lmkan::ort

#endif  // LMKAN_ONNXRUNTIME_LOOKUP2D_OP_H_
