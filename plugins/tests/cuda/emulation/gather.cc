// The kernels of GATHER as C++.
#include "kernels/cuda/gather.cu"
