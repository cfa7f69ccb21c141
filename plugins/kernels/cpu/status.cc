#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace lmkan::cpu {

lmkan_status Fail(lmkan_status status, const Message& message, const char* format, ...) {
  if (message.text != nullptr && message.size > 0) {
    va_list values;
    va_start(values, format);
    std::vsnprintf(message.text, message.size, format, values);
    va_end(values);
  }
  return status;
}

}  // namespace lmkan::cpu
