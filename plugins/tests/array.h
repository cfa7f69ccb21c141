// Arrays of float32, float16, bfloat16 or int8 numbers whose elements are read and written as
// float64.
//
// The conversions of floats work on exponents and significands as numbers. They share nothing with
// the bit arithmetic of kernels/cpu/float16.h, so that one can test the other.
#ifndef LMKAN_TESTS_ARRAY_H_
#define LMKAN_TESTS_ARRAY_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lmkan/lookup2d.h"

namespace lmkan::test {

// Those of x and y.
inline constexpr lmkan_dtype kXDtypes[] = {LMKAN_FLOAT32, LMKAN_FLOAT16, LMKAN_BFLOAT16};

const char* DtypeName(lmkan_dtype dtype);

size_t ElementSize(lmkan_dtype dtype);

// The smallest positive number of a floating-point type.
double SmallestSubnormal(lmkan_dtype dtype);

// Significand bits of a floating-point type, the hidden one included.
int Precision(lmkan_dtype dtype);

// The nearest number of a type, ties to even; beyond the largest float infinity, beyond the largest
// integer that one.
double Round(lmkan_dtype dtype, double value);

// Bits of a number; value must be one of the type. A NaN becomes a quiet one.
uint32_t Encode(lmkan_dtype dtype, double value);

// The number that the bits stand for.
double Decode(lmkan_dtype dtype, uint32_t bits);

class Array {
 public:
  Array(lmkan_dtype dtype, int64_t size);

  lmkan_dtype dtype() const { return dtype_; }
  int64_t size() const { return size_; }
  size_t num_bytes() const { return bytes_.size(); }
  unsigned char* data() { return bytes_.data(); }
  const unsigned char* data() const { return bytes_.data(); }
  unsigned char* at(int64_t index) { return bytes_.data() + index * ElementSize(dtype_); }
  const unsigned char* at(int64_t index) const {
    return bytes_.data() + index * ElementSize(dtype_);
  }

  double Get(int64_t index) const { return Decode(dtype_, GetBits(index)); }
  void Set(int64_t index, double value) { SetBits(index, Encode(dtype_, Round(dtype_, value))); }
  uint32_t GetBits(int64_t index) const;
  void SetBits(int64_t index, uint32_t bits);

  // Sets every byte.
  void Fill(unsigned char byte);

  std::vector<double> ToDoubles() const;

 private:
  lmkan_dtype dtype_;
  int64_t size_;
  std::vector<unsigned char> bytes_;
};

}  // namespace lmkan::test

#endif  // LMKAN_TESTS_ARRAY_H_
