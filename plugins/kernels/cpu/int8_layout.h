// Where the outputs of a block of an INT8 table lie.
#ifndef LMKAN_KERNELS_CPU_INT8_LAYOUT_H_
#define LMKAN_KERNELS_CPU_INT8_LAYOUT_H_

#include <cstdint>

namespace lmkan::cpu {

// The byte of a corner that holds `output` of a block of `width` outputs. Interleaving works in 16
// bytes each: quarter q of all these, taken together, becomes the q-th vector of 32-bit sums.
constexpr int64_t Int8Offset(int64_t width, int64_t output) {
  if (width < 16) return output;
  const int64_t quarter = width / 4;
  const int64_t in_quarter = output % quarter;
  return in_quarter / 4 * 16 + output / quarter * 4 + in_quarter % 4;
}

}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_INT8_LAYOUT_H_
