// Formatting of the one-line messages that accompany a status.
#ifndef LMKAN_KERNELS_CPU_STATUS_H_
#define LMKAN_KERNELS_CPU_STATUS_H_

#include <cstddef>

#include "lmkan/lookup2d.h"

namespace lmkan::cpu {

// Where the caller wants the message; `text` may be null.
struct Message {
  char* text;
  size_t size;
};

// Writes the formatted message and returns `status`.
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
lmkan_status Fail(lmkan_status status, const Message& message, const char* format, ...);

}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_STATUS_H_
