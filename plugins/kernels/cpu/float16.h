// float16 and bfloat16 as storage types: exact widening, narrowing to nearest even.
//
// Each kernel file compiles these for its own instruction set, so they have internal linkage.
#ifndef LMKAN_KERNELS_CPU_FLOAT16_H_
#define LMKAN_KERNELS_CPU_FLOAT16_H_

#include <cstdint>
#include <cstring>

namespace lmkan::cpu {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

namespace {

inline float FloatFromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t BitsFromFloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float ToFloat(float value) { return value; }

inline float ToFloat(BFloat16 value) { return FloatFromBits(uint32_t{value.bits} << 16); }

inline float ToFloat(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t rest = value.bits & 0x7fffu;
  // Moving the exponent into float32's place leaves it too small by 2^112; subnormals come out
  // right as well, because the multiplication normalises them.
  if (rest < 0x7c00u) {
    return FloatFromBits(sign | BitsFromFloat(FloatFromBits(rest << 13) * 0x1p112f));
  }
  return FloatFromBits(sign | 0x7f800000u | (rest << 13));
}

inline void FromFloat(float value, float* out) { *out = value; }

inline void FromFloat(float value, BFloat16* out) {
  const uint32_t bits = BitsFromFloat(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {  // NaN: keep it one after the cut
    out->bits = static_cast<uint16_t>((bits >> 16) | 0x0040u);
    return;
  }
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void FromFloat(float value, Float16* out) {
  const uint32_t bits = BitsFromFloat(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 aligns and rounds the subnormal
    half = BitsFromFloat(FloatFromBits(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0x0fffu + ((rest >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace
}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_FLOAT16_H_
