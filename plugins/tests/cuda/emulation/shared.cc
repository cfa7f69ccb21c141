// The kernels of SHARED as C++.
#include "kernels/cuda/shared.cu"
