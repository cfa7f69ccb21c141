/* C interface of the lmKAN lookup on NVIDIA GPUs.
 *
 * The same function as lookup2d.h; all tensors are in device memory. A lookup only launches kernels
 * on the caller's stream: it never allocates, synchronises, or changes the device's state, so it
 * may be captured in a CUDA graph. Results are deterministic: they depend neither on the device's
 * load nor, for one tactic, on the batch that a row came in.
 *
 * Every function works on the calling thread's current device, is safe to call from several threads
 * at once, and reports a failed launch as LMKAN_CUDA_ERROR.
 */
#ifndef LMKAN_LOOKUP2D_CUDA_H_
#define LMKAN_LOOKUP2D_CUDA_H_

#include "lmkan/lookup2d.h"

#ifdef __cplusplus
extern "C" {
#endif

/* lmkan_status besides those of lookup2d.h: the CUDA runtime refused; the message has its words. */
enum { LMKAN_CUDA_ERROR = 4 };

/* Ways to compute a lookup. Each gives the same result up to rounding. */
typedef int32_t lmkan_cuda_tactic;
enum {
  LMKAN_CUDA_AUTO = 0,   /* GATHER or SHARED, which should be faster for the number of rows */
  LMKAN_CUDA_GATHER = 1, /* reads the corners that rows need, from L2: small batches, any size */
  LMKAN_CUDA_SHARED = 2, /* keeps slices of the table in shared memory: large batches */
  LMKAN_CUDA_NARROW = 3, /* the same for all outputs of many pairs: large batches, few outputs */
  LMKAN_CUDA_SPLIT = 4   /* SHARED with the pairs split among blocks: middle batches */
};

/* Writes the tactics that can run such a table on the current device, best first for large batches,
 * without AUTO; at most `capacity`. `desc` holds device pointers, which are not read and may be
 * NULL. Returns how many there are; 0 for an invalid description, and without a device that the
 * kernels were compiled for. Loads them, which a first lookup would do otherwise: call it before
 * capturing a graph. */
LMKAN_API int32_t lmkan_cuda_tactics(const lmkan_table_desc* desc, lmkan_dtype dtype,
                                     lmkan_cuda_tactic* tactics, int32_t capacity);

/* Bytes of device memory that a lookup of up to `rows` rows needs besides its tensors; exact, and
 * never less for more rows. Aligned to 16 bytes, and in use until the stream has passed the lookup:
 * lookups on several streams need one each. */
LMKAN_API lmkan_status lmkan_cuda_workspace_size(const lmkan_table_desc* desc, lmkan_dtype dtype,
                                                 int64_t rows, lmkan_cuda_tactic tactic,
                                                 size_t* bytes, char* message, size_t message_size);

/* Launches y = lookup(x): x is [rows][2 * num_pairs], y [rows][num_outputs], both contiguous, of
 * type `dtype` and aligned to 16 bytes, as are the table and its scales. `stream` is a
 * cudaStream_t. A tactic is LMKAN_UNSUPPORTED where lmkan_cuda_tactics does not offer it. With an
 * INT8 table |y| must stay below 2^114. */
LMKAN_API lmkan_status lmkan_cuda_lookup2d(const lmkan_table_desc* desc, lmkan_dtype dtype,
                                           const void* x, void* y, int64_t rows,
                                           lmkan_cuda_tactic tactic, void* workspace,
                                           size_t workspace_size, void* stream, char* message,
                                           size_t message_size);

#ifdef __cplusplus
}
#endif

#endif /* LMKAN_LOOKUP2D_CUDA_H_ */
