// Features and tables that tests look up. Equal seeds give equal numbers on every platform.
#ifndef LMKAN_TESTS_INPUTS_H_
#define LMKAN_TESTS_INPUTS_H_

#include <cstdint>
#include <random>

#include "array.h"
#include "oracle.h"
#include "table.h"

namespace lmkan::test {

// The distributions of <random> differ between C++ libraries, the generators don't.
class Random {
 public:
  explicit Random(uint64_t seed) : generator_(seed) {}

  // 0 ... end - 1.
  int64_t Index(int64_t end) {
    return static_cast<int64_t>(generator_() % static_cast<uint64_t>(end));
  }
  double Uniform(double low, double high) {
    return low + (high - low) * static_cast<double>(generator_() >> 11) * 0x1p-53;
  }
  uint64_t Bits() { return generator_(); }

 private:
  std::mt19937_64 generator_;
};

// Floats between -1 and 1, with zeros and subnormals among them. Integers of all values, and scales
// of both signs around 1/100, with zeros, subnormals and large numbers among them.
Table MakeTable(const Shape& shape, lmkan_dtype dtype, uint64_t seed);

// Finite features: the grid's range, the tails to |x| = 180, zeros of both signs, subnormals, and
// grid points with their neighbours. Kernels for INT8 tables treat a group of four pairs otherwise
// when one of its features is far beyond the grid: half of the groups stay on the grid or near it,
// some of them around the limit.
Array MakeX(const Shape& shape, lmkan_dtype dtype, uint64_t seed);

}  // namespace lmkan::test

#endif  // LMKAN_TESTS_INPUTS_H_
