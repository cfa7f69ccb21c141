// The C interface of the CUDA kernels on host memory, by the CPU's kernels: the adapter around it
// can then be tested to the last value on machines without a GPU.
#include <algorithm>
#include <cstdio>

#include "lmkan/lookup2d_cuda.h"

namespace {

bool IsTactic(lmkan_cuda_tactic tactic) {
  return tactic >= LMKAN_CUDA_AUTO && tactic <= LMKAN_CUDA_SPLIT;
}

}  // namespace

extern "C" {

int32_t lmkan_cuda_tactics(const lmkan_table_desc*, lmkan_dtype, lmkan_cuda_tactic* tactics,
                           int32_t capacity) {
  constexpr lmkan_cuda_tactic kTactics[] = {LMKAN_CUDA_NARROW, LMKAN_CUDA_SHARED, LMKAN_CUDA_SPLIT,
                                            LMKAN_CUDA_GATHER};
  std::copy_n(kTactics, std::min(capacity, 4), tactics);
  return 4;
}

// SPLIT has another need than that of the CUDA kernels: room for y in float32.
lmkan_status lmkan_cuda_workspace_size(const lmkan_table_desc* desc, lmkan_dtype, int64_t rows,
                                       lmkan_cuda_tactic tactic, size_t* bytes, char* message,
                                       size_t message_size) {
  if (!IsTactic(tactic)) {
    std::snprintf(message, message_size, "expected tactic 0 to 4, found %d", tactic);
    return LMKAN_INVALID_ARGUMENT;
  }
  const auto outputs = static_cast<size_t>(rows * desc->num_outputs);
  *bytes = tactic == LMKAN_CUDA_SPLIT ? sizeof(float) * outputs : 0;
  return LMKAN_OK;
}

lmkan_status lmkan_cuda_lookup2d(const lmkan_table_desc* desc, lmkan_dtype dtype, const void* x,
                                 void* y, int64_t rows, lmkan_cuda_tactic tactic, void* workspace,
                                 size_t workspace_size, void* stream, char* message,
                                 size_t message_size) {
  size_t needed = 0;
  lmkan_cuda_workspace_size(desc, dtype, rows, tactic, &needed, message, message_size);
  if (workspace_size < needed || (needed > 0 && workspace == nullptr)) {
    std::snprintf(message, message_size, "expected a workspace of %zu bytes, found %zu", needed,
                  workspace == nullptr ? 0 : workspace_size);
    return LMKAN_INVALID_ARGUMENT;
  }
  if (stream == nullptr) {
    std::snprintf(message, message_size, "expected the stream that TensorRT gave, found none");
    return LMKAN_INVALID_ARGUMENT;
  }
  for (size_t i = 0; i < needed; ++i) static_cast<char*>(workspace)[i] = 1;
  lmkan_cpu_table* table = nullptr;
  lmkan_status status =
      lmkan_cpu_table_create(desc, LMKAN_BORROW, LMKAN_ISA_AUTO, &table, message, message_size);
  if (status == LMKAN_OK) {
    status = lmkan_cpu_lookup2d(table, dtype, x, y, rows, 0, 1, message, message_size);
  }
  lmkan_cpu_table_destroy(table);
  return status;
}

}  // extern "C"
