// The part of accumulate.h for INT8 tables: products in integers, and few of them.
//
// An entry becomes the upper byte of a 16-bit integer, which one instruction multiplies by a 16-bit
// weight. Weights are rounded to 1 / kWeightOne, products to 1 / kValueOne, both a hundredth of a
// step of the table; weights add up to one exactly, so a constant stays what it is. The values of
// two pairs are interleaved and multiplied by their scales, so that one conversion to float32
// finishes a group.
//
// 32 bits hold that: |value| <= 128 * kValueOne + 2, and 4 * 16386 * kScaleOne < 2^31.
//
// Positions beyond the grid don't fit: such pairs are left out (their weights are 0) and added
// afterwards, with four 16-bit weights.
//
// A vector type has for this:
//   V::kOutputs   8, 16, 32 or 64;  V::kLanes   a quarter of it, of 8 half of it
//   V::Reg        kLanes float32, with Zero, Load, Store and MultiplyAdd as in accumulate.h
//   V::Bytes      kOutputs, in the lower half of 16 where there are 8
//   V::Words      half as many of 16 bits;  V::Ints  a quarter as many of 32 bits
//   V::LoadBytes(const int8_t*)  V::LoadWords(const int16_t*)  V::ZeroWords()
//   V::RepeatWord(int16_t)  V::RepeatAsWords(int32_t)   in all lanes of 16 or 32 bits
//   V::ShiftLow(Bytes)  V::ShiftHigh(Bytes)   Words: the lower and upper eight bytes of every 16,
//                             times 2^8
//   V::InterleaveBytesLow(a, b)  V::InterleaveBytesHigh(a, b)   the lower and upper eight bytes of
//                             every 16, those of a and of b by turns; InterleaveWords... of Words
//   V::MultiplyHigh(a, b)     the products of Words over 2^15, rounded
//   V::Add(a, b)              of Words
//   V::MultiplyWords(a, b)    products of neighbouring Words, added: Ints
//   V::MultiplyAddWords(a, b, c)   the same plus c
//   V::ToFloats(Ints)
// and for pairs beyond the grid
//   V::WidenLow(Bytes)  V::WidenHigh(Bytes)   the lower and upper eight bytes of every 16: Words
//   V::FirstOfTwo(Words)  V::SecondOfTwo(Words)   the even and the odd ones: Ints
//   V::Broadcast(float)  V::Multiply   of Reg
#ifndef LMKAN_KERNELS_CPU_ACCUMULATE_INT8_H_
#define LMKAN_KERNELS_CPU_ACCUMULATE_INT8_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "inlining.h"
#include "kernel.h"

namespace lmkan::cpu {
namespace {

// Vectors of sums; two where the outputs fill only the lower halves of Bytes.
template <class V>
inline constexpr int kInt8Vectors = V::kOutputs / V::kLanes;

// Values of one pair for V::kOutputs outputs, times kValueOne.
template <class V>
struct PairValues {
  typename V::Words low;
  typename V::Words high;
};

template <class V>
LMKAN_ALWAYS_INLINE PairValues<V> InterpolatePair(const int8_t* corner, const TableStrides& strides,
                                                  const CellRecord& record, int pair) {
  PairValues<V> values = {V::ZeroWords(), V::ZeroWords()};
  for (int c = 0; c < 4; ++c) {
    const auto weight = V::RepeatWord(record.weights[pair][c]);
    const auto entries =
        V::LoadBytes(corner + (c / 2 == 1 ? strides.line : 0) + (c % 2 == 1 ? strides.cell : 0));
    const auto low = V::MultiplyHigh(weight, V::ShiftLow(entries));
    values.low = c == 0 ? low : V::Add(values.low, low);
    if constexpr (kInt8Vectors<V> == 4) {
      const auto high = V::MultiplyHigh(weight, V::ShiftHigh(entries));
      values.high = c == 0 ? high : V::Add(values.high, high);
    }
  }
  return values;
}

// Adds pairs kPair and, if kPairs reaches as far, kPair + 1 to the integer sums of a group.
template <class V, int kPair, int kPairs>
LMKAN_ALWAYS_INLINE void AddTwoPairs(const int8_t* slices, const TableStrides& strides,
                                     const CellRecord& record, const int16_t* multiples,
                                     typename V::Ints (&totals)[kInt8Vectors<V>]) {
  const auto values = [&](int pair) {
    return InterpolatePair<V>(slices + pair * strides.pair + record.cell[pair] * strides.cell,
                              strides, record, pair);
  };
  const PairValues<V> first = values(kPair);
  PairValues<V> second = {V::ZeroWords(), V::ZeroWords()};
  if constexpr (kPair + 1 < kPairs) second = values(kPair + 1);
  for (int v = 0; v < kInt8Vectors<V>; ++v) {
    const typename V::Words& a = v < 2 ? first.low : first.high;
    const typename V::Words& b = v < 2 ? second.low : second.high;
    const auto pairs = v % 2 == 0 ? V::InterleaveWordsLow(a, b) : V::InterleaveWordsHigh(a, b);
    const auto scales = V::LoadWords(multiples + kPair * V::kOutputs + v * 2 * V::kLanes);
    totals[v] = kPair == 0 ? V::MultiplyWords(pairs, scales)
                           : V::MultiplyAddWords(pairs, scales, totals[v]);
  }
}

// Adds the first kPairs pairs of a group to the sums of V::kOutputs outputs.
template <class V, int kPairs>
LMKAN_ALWAYS_INLINE void AddInt8Group(const int8_t* slices, const TableStrides& strides,
                                      const CellRecord& record, const Int8Scales& scales,
                                      typename V::Reg (&sums)[kInt8Vectors<V>]) {
  typename V::Ints totals[kInt8Vectors<V>];
  AddTwoPairs<V, 0, kPairs>(slices, strides, record, scales.multiples, totals);
  if constexpr (kPairs > 2) {
    AddTwoPairs<V, 2, kPairs>(slices, strides, record, scales.multiples, totals);
  }
  for (int v = 0; v < kInt8Vectors<V>; ++v) {
    sums[v] =
        V::MultiplyAdd(V::ToFloats(totals[v]), V::Load(scales.units + v * V::kLanes), sums[v]);
  }
}

// The largest weight becomes 2^13 ... 2^14 units, a power of two. The integers add up to one, as
// the weights do, so that a constant stays what it is. NaN where a weight is not finite.
inline FarPair MakeFarPair(int64_t row, int pair, int32_t cell, float position1, float position2) {
  const float low1 = 1.0f - position1;
  const float low2 = 1.0f - position2;
  const float weights[4] = {low1 * low2, low1 * position2, position1 * low2, position1 * position2};
  FarPair far = {static_cast<int32_t>(row), pair, cell, 0, 0, NAN};
  float largest = 0;
  for (const float weight : weights) {
    if (!std::isfinite(weight)) return far;
    largest = std::max(largest, std::fabs(weight));
  }
  uint32_t bits;
  std::memcpy(&bits, &largest, sizeof bits);
  const int exponent = static_cast<int>(bits >> 23) - 126;  // largest < 2^exponent; -1 at least
  const auto power_of_two = [](int power) {
    const uint32_t power_bits = static_cast<uint32_t>(power + 127) << 23;
    float value;
    std::memcpy(&value, &power_bits, sizeof value);
    return value;
  };
  const float units = power_of_two(14 - exponent);
  const auto round = [units](float weight) {
    return static_cast<int32_t>(weight * units + std::copysign(0.5f, weight));
  };
  const int32_t one = exponent > 14 ? 0 : 1 << (14 - exponent);
  const int32_t w01 = round(weights[1]), w10 = round(weights[2]), w11 = round(weights[3]);
  const int32_t w00 = one - w01 - w10 - w11;
  const auto side_by_side = [](int32_t low, int32_t high) {
    return static_cast<int32_t>((static_cast<uint32_t>(high) << 16) |
                                (static_cast<uint32_t>(low) & 0xffffu));
  };
  far.weights1 = side_by_side(w00, w01);
  far.weights2 = side_by_side(w10, w11);
  far.unit = power_of_two(exponent - 14);
  return far;
}

// Adds a far pair to the sums, in memory, of V::kOutputs outputs.
template <class V>
LMKAN_ALWAYS_INLINE void AddFarPair(const int8_t* slices, const TableStrides& strides,
                                    const Int8Scales& scales, const FarPair& far, float* sums) {
  const int8_t* corner = slices + far.pair * strides.pair + far.cell * strides.cell;
  const auto line0 = V::LoadBytes(corner);
  const auto line0_next = V::LoadBytes(corner + strides.cell);
  const auto line1 = V::LoadBytes(corner + strides.line);
  const auto line1_next = V::LoadBytes(corner + strides.line + strides.cell);
  const typename V::Bytes pairs0[2] = {V::InterleaveBytesLow(line0, line0_next),
                                       V::InterleaveBytesHigh(line0, line0_next)};
  const typename V::Bytes pairs1[2] = {V::InterleaveBytesLow(line1, line1_next),
                                       V::InterleaveBytesHigh(line1, line1_next)};
  const auto weights1 = V::RepeatAsWords(far.weights1);
  const auto weights2 = V::RepeatAsWords(far.weights2);
  const auto unit = V::Broadcast(far.unit * kValueOne);
  const int16_t* multiples = scales.multiples + far.pair / 2 * 2 * V::kOutputs;
  for (int v = 0; v < kInt8Vectors<V>; ++v) {
    const auto widened0 = v % 2 == 0 ? V::WidenLow(pairs0[v / 2]) : V::WidenHigh(pairs0[v / 2]);
    const auto widened1 = v % 2 == 0 ? V::WidenLow(pairs1[v / 2]) : V::WidenHigh(pairs1[v / 2]);
    const auto value =
        V::MultiplyAddWords(weights2, widened1, V::MultiplyWords(weights1, widened0));
    const auto two_multiples = V::LoadWords(multiples + v * 2 * V::kLanes);
    const auto multiple = V::ToFloats(far.pair % 2 == 0 ? V::FirstOfTwo(two_multiples)
                                                        : V::SecondOfTwo(two_multiples));
    const auto scale =
        V::Multiply(V::Multiply(unit, multiple), V::Load(scales.units + v * V::kLanes));
    float* sum = sums + v * V::kLanes;
    V::Store(sum, V::MultiplyAdd(V::ToFloats(value), scale, V::Load(sum)));
  }
}

// The far pairs of a pass, after its other pairs.
template <class V>
void AddFarPairs(const AccumulateArgs& args) {
  for (int64_t i = 0; i < args.num_far_pairs; ++i) {
    const FarPair& far = args.far_pairs[i];
    AddFarPair<V>(static_cast<const int8_t*>(args.slices), args.strides, args.scales, far,
                  args.out + far.row * args.out_stride);
  }
}

// The far pairs of one row and group. Rare, so it is not inlined: sums are in memory.
template <class V>
LMKAN_NEVER_INLINE void AddFarPairsOfRow(const int8_t* slices, const TableStrides& strides,
                                         const Int8Scales& scales, const FarPair* begin,
                                         const FarPair* end, int64_t row, float* sums) {
  for (const FarPair* far = begin; far != end; ++far) {
    if (far->row == row) AddFarPair<V>(slices, strides, scales, *far, sums);
  }
}

}  // namespace
}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_ACCUMULATE_INT8_H_
