// The kernels of SPLIT as C++.
#include "kernels/cuda/split.cu"
