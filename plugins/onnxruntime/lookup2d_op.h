// The operator LMKAN2D for ONNX Runtime's CPU provider.
#ifndef LMKAN_ONNXRUNTIME_LOOKUP2D_OP_H_
#define LMKAN_ONNXRUNTIME_LOOKUP2D_OP_H_

#include <cstddef>

#include "onnxruntime_c_api.h"

namespace lmkan::ort {

// ONNX Runtime 1.17 brought the last functions used here (ParallelFor, shape inference).
inline constexpr uint32_t kOrtApiVersion = 17;

// One definition for every pair of types of x and table.
inline constexpr size_t kNumLookup2dOps = 9;

// Makes definition `index`, 0 ... kNumLookup2dOps - 1; valid for the life of the library. To be
// called once for each.
const OrtCustomOp* MakeLookup2dOp(size_t index, const OrtApi* api);

}  // namespace lmkan::ort

#endif  // LMKAN_ONNXRUNTIME_LOOKUP2D_OP_H_
