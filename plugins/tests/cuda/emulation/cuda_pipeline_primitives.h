// Asynchronous copies of the emulated CUDA: they happen as late as CUDA allows, in the wait.
#ifndef LMKAN_TESTS_CUDA_EMULATION_CUDA_PIPELINE_PRIMITIVES_H_
#define LMKAN_TESTS_CUDA_EMULATION_CUDA_PIPELINE_PRIMITIVES_H_

#include "cuda_runtime.h"

void __pipeline_memcpy_async(void* to, const void* from, size_t bytes);
void __pipeline_commit();
void __pipeline_wait_prior(size_t batches);

#endif  // LMKAN_TESTS_CUDA_EMULATION_CUDA_PIPELINE_PRIMITIVES_H_
