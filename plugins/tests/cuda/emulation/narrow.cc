// The kernels of NARROW as C++.
#include "kernels/cuda/narrow.cu"
