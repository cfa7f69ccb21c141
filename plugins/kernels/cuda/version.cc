// The version functions of lookup2d.h, for a library that has the CUDA kernels alone.
#include "lmkan/lookup2d.h"

int32_t lmkan_abi_version(void) { return LMKAN_ABI_VERSION; }

const char* lmkan_version(void) { return LMKAN_VERSION; }
