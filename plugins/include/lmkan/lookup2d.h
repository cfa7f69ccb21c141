/* C interface of the lmKAN lookup on the CPU.
 *
 *   y[r][o] = sum over pairs p of f_{p,o}(x[r][2p], x[r][2p+1])
 *
 * Each f is bilinear on a grid of (G+1) x (G+1) points, stored as a table
 * [num_pairs][G+1][G+1][num_outputs]. docs/operator.md defines the grid and every corner case.
 *
 * The interface has no dependency on any framework: raw pointers, sizes, and a status. Every
 * function is safe to call from several threads at once; no function throws, aborts, prints, or
 * starts a thread.
 */
#ifndef LMKAN_LOOKUP2D_H_
#define LMKAN_LOOKUP2D_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define LMKAN_API __declspec(dllexport)
#else
#define LMKAN_API __attribute__((visibility("default")))
#endif

/* Raised with every incompatible change of this header. */
#define LMKAN_ABI_VERSION 2

/* The types are integers, so that any number that a caller passes has a meaning here, if only that
 * of an invalid argument. */
typedef int32_t lmkan_status;
enum {
  LMKAN_OK = 0,
  LMKAN_INVALID_ARGUMENT = 1, /* the message says which one, what was expected, what was found */
  LMKAN_OUT_OF_MEMORY = 2,
  LMKAN_UNSUPPORTED = 3 /* the processor lacks the requested instruction set */
};

/* Element types. INT8 is for tables alone: an entry is its integer times the scale of its pair and
 * output. Sums of it are up to 2^22 times too large until the end, so scales below 1e-31 lose
 * digits, and |y| above 1e31 may become infinite. */
typedef int32_t lmkan_dtype;
enum { LMKAN_FLOAT32 = 0, LMKAN_FLOAT16 = 1, LMKAN_BFLOAT16 = 2, LMKAN_INT8 = 3 };

/* Instruction sets; AUTO takes the best one that the processor has. */
typedef int32_t lmkan_isa;
enum { LMKAN_ISA_AUTO = 0, LMKAN_ISA_PORTABLE = 1, LMKAN_ISA_AVX2 = 2, LMKAN_ISA_AVX512 = 3 };

/* COPY repacks the table for the kernels and lets go of the caller's memory. BORROW reads the
 * caller's memory where its type and layout allow that (no copy, somewhat slower lookups); the
 * caller keeps it alive and unchanged for the life of the handle. An INT8 table is always copied:
 * with BORROW in the smaller of two layouts, with COPY in the one that is expected to be faster. */
typedef int32_t lmkan_ownership;
enum { LMKAN_COPY = 0, LMKAN_BORROW = 1 };

/* A table, [num_pairs][num_grids + 1][num_grids + 1][num_outputs], contiguous. */
typedef struct lmkan_table_desc {
  const void* data;
  lmkan_dtype dtype;
  int64_t num_pairs;   /* N_in / 2, at least 1 */
  int64_t num_grids;   /* cells along an axis, at least 3 */
  int64_t num_outputs; /* at least 1 */
  const float* scales; /* [num_pairs][num_outputs] of an INT8 table; otherwise NULL */
} lmkan_table_desc;

/* A table made ready for lookups. Immutable: any number of threads may use one handle. */
typedef struct lmkan_cpu_table lmkan_cpu_table;

/* Version of the interface that the library was compiled with (LMKAN_ABI_VERSION). */
LMKAN_API int32_t lmkan_abi_version(void);

/* Release of the library, "major.minor.patch". */
LMKAN_API const char* lmkan_version(void);

/* Checks the description and prepares the table. On success *table holds a handle to be given to
 * lmkan_cpu_table_destroy. On failure *table is NULL and `message` (when not NULL) holds one line
 * of at most message_size bytes, the terminating zero included. */
LMKAN_API lmkan_status lmkan_cpu_table_create(const lmkan_table_desc* desc,
                                              lmkan_ownership ownership, lmkan_isa isa,
                                              lmkan_cpu_table** table, char* message,
                                              size_t message_size);

/* Frees a handle; NULL is ignored. */
LMKAN_API void lmkan_cpu_table_destroy(lmkan_cpu_table* table);

/* Name of the instruction set that the handle's lookups use: "portable", "avx2", "avx512". */
LMKAN_API const char* lmkan_cpu_table_isa(const lmkan_cpu_table* table);

/* Number of independent tasks that a lookup of `rows` rows is worth on `num_threads` threads: at
 * least 1. The result of a lookup does not depend on the number of tasks, bit for bit, but for the
 * sign of NaN. */
LMKAN_API int64_t lmkan_cpu_num_tasks(const lmkan_cpu_table* table, int64_t rows,
                                      int32_t num_threads);

/* Task `task` of `num_tasks` of y = lookup(x): x is [rows][2 * num_pairs], y [rows][num_outputs],
 * both contiguous and of type `dtype`. y is complete when every task 0 ... num_tasks - 1 has
 * returned LMKAN_OK, in any order, on any threads. num_tasks is any number that is at least 1. */
LMKAN_API lmkan_status lmkan_cpu_lookup2d(const lmkan_cpu_table* table, lmkan_dtype dtype,
                                          const void* x, void* y, int64_t rows, int64_t task,
                                          int64_t num_tasks, char* message, size_t message_size);

#ifdef __cplusplus
}
#endif

#endif /* LMKAN_LOOKUP2D_H_ */
