// What the compiler must inline, and what it must not.
#ifndef LMKAN_KERNELS_CPU_INLINING_H_
#define LMKAN_KERNELS_CPU_INLINING_H_

// Compilers give up on inlining when a template has many instances; a call would spill the sums.
#if defined(_MSC_VER)
#define LMKAN_ALWAYS_INLINE __forceinline
#define LMKAN_NEVER_INLINE __declspec(noinline)
#else
#define LMKAN_ALWAYS_INLINE inline __attribute__((always_inline))
#define LMKAN_NEVER_INLINE __attribute__((noinline))
#endif

#endif  // LMKAN_KERNELS_CPU_INLINING_H_
