// The kernels of SHARED with copies by the tensor memory accelerator as C++.
#include "kernels/cuda/shared_bulk.cu"
