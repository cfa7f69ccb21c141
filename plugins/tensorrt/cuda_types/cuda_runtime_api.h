// The two types of the CUDA runtime that TensorRT's headers name, for machines without its headers.
// The build searches this folder last, so that the real header wins where there is one.
#ifndef LMKAN_TENSORRT_CUDA_TYPES_H_
#define LMKAN_TENSORRT_CUDA_TYPES_H_

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;

#endif  // LMKAN_TENSORRT_CUDA_TYPES_H_
