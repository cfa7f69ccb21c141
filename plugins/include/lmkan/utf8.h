/* Names in messages: cut short, but not inside of a character. */
#ifndef LMKAN_UTF8_H_
#define LMKAN_UTF8_H_

#include <cstddef>

namespace lmkan {

// Bytes of the longest beginning of a UTF-8 text that has no more than `most` and ends with a whole
// character.
inline size_t Utf8Prefix(const char* text, size_t most) {
  size_t size = 0;
  while (size < most && text[size] != '\0') ++size;
  if (text[size] == '\0') return size;
  while (size > 0 && (static_cast<unsigned char>(text[size]) & 0xc0u) == 0x80u) --size;
  return size;
}

// The same for printf's "%.*s", with as many bytes as a message has for a name.
inline int NameBytes(const char* name) { return static_cast<int>(Utf8Prefix(name, 160)); }

}  // namespace lmkan

#endif  // LMKAN_UTF8_H_
