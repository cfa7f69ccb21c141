// Conversions of kernels/cpu/float16.h, for all float16 and bfloat16 numbers.
#include "float16.h"

#include <cmath>
#include <limits>

#include "array.h"
#include "check.h"
#include "inputs.h"

namespace lmkan::test {
namespace {

template <class T>
uint16_t Narrow(float value) {
  T narrow;
  cpu::FromFloat(value, &narrow);
  return narrow.bits;
}

template <class T>
void TestWideningIsExact(lmkan_dtype dtype) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float wide = cpu::ToFloat(T{static_cast<uint16_t>(bits)});
    const double expected = Decode(dtype, bits);
    const bool equal = std::isnan(expected) ? std::isnan(wide)
                                            : double{wide} == expected &&
                                                  std::signbit(wide) == std::signbit(expected);
    LMKAN_EXPECT(equal, "%s 0x%04x becomes %.9g, not %.9g", DtypeName(dtype), bits, double{wide},
                 expected);
  }
}

template <class T>
void TestRoundTrip(lmkan_dtype dtype) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float wide = cpu::ToFloat(T{static_cast<uint16_t>(bits)});
    const uint32_t back = Narrow<T>(wide);
    // A NaN stays one; which one is not promised.
    const bool same = std::isnan(wide) ? std::isnan(Decode(dtype, back)) : back == bits;
    LMKAN_EXPECT(same, "%s 0x%04x comes back as 0x%04x", DtypeName(dtype), bits, back);
  }
}

// Between each number and the next larger one in magnitude: the middle goes to the even one, and
// the float32 numbers next to the middle go to the nearer one. Infinity counts as the number that
// would follow the largest.
template <class T>
void TestRoundingToNearestEven(lmkan_dtype dtype) {
  const uint32_t infinity = Encode(dtype, std::numeric_limits<double>::infinity());
  for (uint32_t bits = 0; bits < infinity; ++bits) {
    const double low = Decode(dtype, bits);
    const double high =
        bits + 1 < infinity ? Decode(dtype, bits + 1) : 2 * low - Decode(dtype, bits - 1);
    const auto middle = static_cast<float>((low + high) / 2);
    LMKAN_EXPECT(double{middle} == (low + high) / 2, "the middle of 0x%04x is not float32", bits);
    const uint32_t even = bits % 2 == 0 ? bits : bits + 1;
    for (const uint32_t sign : {0u, 0x8000u}) {
      const auto signed_value = [sign](float value) { return sign != 0 ? -value : value; };
      const uint32_t at = Narrow<T>(signed_value(middle));
      LMKAN_EXPECT(at == (even | sign), "%s: %.9g becomes 0x%04x, not 0x%04x", DtypeName(dtype),
                   double{signed_value(middle)}, at, even | sign);
      const float below = std::nextafter(middle, 0.0f);
      const uint32_t down = Narrow<T>(signed_value(below));
      LMKAN_EXPECT(down == (bits | sign), "%s: %.9g becomes 0x%04x, not 0x%04x", DtypeName(dtype),
                   double{signed_value(below)}, down, bits | sign);
      const float above = std::nextafter(middle, std::numeric_limits<float>::infinity());
      const uint32_t up = Narrow<T>(signed_value(above));
      LMKAN_EXPECT(up == ((bits + 1) | sign), "%s: %.9g becomes 0x%04x, not 0x%04x",
                   DtypeName(dtype), double{signed_value(above)}, up, (bits + 1) | sign);
    }
  }
}

template <class T>
void TestRandomFloats(lmkan_dtype dtype) {
  Random random(3);
  for (int i = 0; i < 300000; ++i) {
    const auto bits = static_cast<uint32_t>(random.Bits());
    const float value = cpu::FloatFromBits(bits);
    const uint32_t found = Narrow<T>(value);
    const double expected = Round(dtype, value);
    const bool same =
        std::isnan(expected) ? std::isnan(Decode(dtype, found)) : found == Encode(dtype, expected);
    LMKAN_EXPECT(same, "%s: 0x%08x becomes 0x%04x", DtypeName(dtype), bits, found);
  }
}

// NaNs whose payload lies in the bits that are cut off must not become infinities.
template <class T>
void TestEveryNanStaysOne(lmkan_dtype dtype) {
  for (const uint32_t sign : {0u, 0x80000000u}) {
    for (int bit = 0; bit < 23; ++bit) {
      for (const uint32_t payload : {1u << bit, (2u << bit) - 1}) {
        const uint32_t found = Narrow<T>(cpu::FloatFromBits(sign | 0x7f800000u | payload));
        LMKAN_EXPECT(std::isnan(Decode(dtype, found)), "%s: payload 0x%06x becomes 0x%04x",
                     DtypeName(dtype), payload, found);
      }
    }
  }
}

template <class T>
void TestType(lmkan_dtype dtype) {
  TestWideningIsExact<T>(dtype);
  TestRoundTrip<T>(dtype);
  TestRoundingToNearestEven<T>(dtype);
  TestRandomFloats<T>(dtype);
  TestEveryNanStaysOne<T>(dtype);
}

}  // namespace
}  // namespace lmkan::test

int main() {
  using namespace lmkan::test;
  TestType<lmkan::cpu::Float16>(LMKAN_FLOAT16);
  TestType<lmkan::cpu::BFloat16>(LMKAN_BFLOAT16);
  return Finish();
}
