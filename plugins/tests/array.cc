#include "array.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace lmkan::test {
namespace {

struct Format {
  int precision;         // significand bits, the hidden one included
  int quantum_exponent;  // the subnormals are multiples of 2^quantum_exponent
  int end_exponent;      // finite numbers are below 2^end_exponent
  int sign_bit;
};

Format FormatOf(lmkan_dtype dtype) {
  switch (dtype) {
    case LMKAN_FLOAT16:
      return {11, -24, 16, 15};
    case LMKAN_BFLOAT16:
      return {8, -133, 128, 15};
    default:
      return {24, -149, 128, 31};
  }
}

}  // namespace

const char* DtypeName(lmkan_dtype dtype) {
  switch (dtype) {
    case LMKAN_FLOAT16:
      return "float16";
    case LMKAN_BFLOAT16:
      return "bfloat16";
    case LMKAN_INT8:
      return "int8";
    default:
      return "float32";
  }
}

size_t ElementSize(lmkan_dtype dtype) {
  return dtype == LMKAN_FLOAT32 ? 4 : dtype == LMKAN_INT8 ? 1 : 2;
}

double SmallestSubnormal(lmkan_dtype dtype) {
  return std::ldexp(1.0, FormatOf(dtype).quantum_exponent);
}

int Precision(lmkan_dtype dtype) { return FormatOf(dtype).precision; }

double Round(lmkan_dtype dtype, double value) {
  if (dtype == LMKAN_INT8) return std::clamp(std::nearbyint(value), -128.0, 127.0);
  if (value == 0.0 || !std::isfinite(value)) return value;
  const Format format = FormatOf(dtype);
  int exponent;
  std::frexp(value, &exponent);
  const int quantum = std::max(exponent - format.precision, format.quantum_exponent);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -quantum)), quantum);
  if (std::fabs(rounded) < std::ldexp(1.0, format.end_exponent)) return rounded;
  return std::copysign(std::numeric_limits<double>::infinity(), value);
}

uint32_t Encode(lmkan_dtype dtype, double value) {
  if (dtype == LMKAN_INT8) return static_cast<uint32_t>(value < 0 ? value + 256 : value);
  const Format format = FormatOf(dtype);
  const int fraction_bits = format.precision - 1;
  const uint32_t one = uint32_t{1} << fraction_bits;
  const uint32_t exponent_mask = (uint32_t{1} << format.sign_bit) - one;
  const uint32_t sign = std::signbit(value) ? uint32_t{1} << format.sign_bit : 0;
  if (std::isnan(value)) return exponent_mask | one >> 1;
  if (std::isinf(value)) return sign | exponent_mask;
  if (value == 0.0) return sign;
  int exponent;
  std::frexp(value, &exponent);
  const int quantum = std::max(exponent - format.precision, format.quantum_exponent);
  // Subnormals lack the hidden bit, and the field 0 of their exponent makes up for it.
  const auto significand = static_cast<uint32_t>(std::ldexp(std::fabs(value), -quantum));
  const auto steps = static_cast<uint32_t>(quantum - format.quantum_exponent);
  return sign | (steps * one + significand);
}

double Decode(lmkan_dtype dtype, uint32_t bits) {
  if (dtype == LMKAN_INT8) return bits < 128 ? bits : static_cast<double>(bits) - 256;
  const Format format = FormatOf(dtype);
  const int fraction_bits = format.precision - 1;
  const uint32_t one = uint32_t{1} << fraction_bits;
  const double sign = (bits >> format.sign_bit & 1u) != 0 ? -1.0 : 1.0;
  const uint32_t fraction = bits & (one - 1);
  const uint32_t field = (bits & ((uint32_t{1} << format.sign_bit) - 1)) >> fraction_bits;
  const uint32_t most = (uint32_t{1} << (format.sign_bit - fraction_bits)) - 1;
  if (field == most) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  if (field == 0) return sign * std::ldexp(fraction, format.quantum_exponent);
  return sign * std::ldexp(one + fraction, format.quantum_exponent + static_cast<int>(field) - 1);
}

Array::Array(lmkan_dtype dtype, int64_t size)
    : dtype_(dtype), size_(size), bytes_(static_cast<size_t>(size) * ElementSize(dtype)) {}

uint32_t Array::GetBits(int64_t index) const {
  if (dtype_ == LMKAN_FLOAT32) {
    uint32_t bits;
    std::memcpy(&bits, at(index), sizeof bits);
    return bits;
  }
  if (dtype_ == LMKAN_INT8) return *at(index);
  uint16_t bits;
  std::memcpy(&bits, at(index), sizeof bits);
  return bits;
}

void Array::SetBits(int64_t index, uint32_t bits) {
  if (dtype_ == LMKAN_FLOAT32) {
    std::memcpy(at(index), &bits, sizeof bits);
    return;
  }
  if (dtype_ == LMKAN_INT8) {
    *at(index) = static_cast<unsigned char>(bits);
    return;
  }
  const auto narrow = static_cast<uint16_t>(bits);
  std::memcpy(at(index), &narrow, sizeof narrow);
}

void Array::Fill(unsigned char byte) { std::fill(bytes_.begin(), bytes_.end(), byte); }

std::vector<double> Array::ToDoubles() const {
  std::vector<double> values(static_cast<size_t>(size_));
  for (int64_t i = 0; i < size_; ++i) values[i] = Get(i);
  return values;
}

}  // namespace lmkan::test
