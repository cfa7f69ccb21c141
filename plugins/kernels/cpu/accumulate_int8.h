// The part of accumulate.h for INT8 tables: corner weights in fixed point, products in integers.
//
// Widening integers to float32 one corner at a time would cost more than the sums. Neighbours along
// the second axis lie side by side, so one instruction multiplies two corners by two 16-bit weights
// and adds them; one conversion and one multiplication by the scale then finish a pair. Weights are
// rounded to 1 / kWeightOne, an error of a hundredth of a step of the table. Weights of 2 and more,
// beyond the grid, don't fit: groups of pairs with such a weight have coarse ones, and those with a
// weight of 16 or more are added in float32.
//
// A vector type has for this, besides what accumulate.h lists:
//   V::PositionsFit(record, pairs, distance)   whether all positions of the first `pairs` pairs are
//                                    at most that far from their cell's centre
//   V::IntReg                        kLanes integers of 32 bits
//   V::RoundPair(Reg a, Reg b)       integers nearest to a and b, in the low and high half of lanes
//   V::StoreFour(int32_t*, IntReg)   the first four lanes
//   V::BroadcastPair(int32_t)        in all lanes
//   V::WidenPairs(const Int8Pair*)   kLanes pairs as 16-bit integers, in the halves of each lane
//   V::MultiplyPairs(a, b)           products of both halves, added: one integer a lane
//   V::MultiplyAddPairs(a, b, c)     the same plus c
//   V::ToFloats(IntReg)
//   V::LowHalves(IntReg)  V::HighHalves(IntReg)   of each lane, sign-extended
// and for compact tables
//   V::InterleaveWordsLow(a, b)      16-bit words of entries a and b by turns, the first four of
//                                    every 16 bytes; InterleaveWordsHigh: the last four
//   V::LowerBytes(IntReg)            of these words, times kEntryMultiple
//   V::UpperBytes(IntReg)            likewise
//   V::DivideHalves(IntReg)          both halves of each lane by kHalvesDivisor
#ifndef LMKAN_KERNELS_CPU_ACCUMULATE_INT8_H_
#define LMKAN_KERNELS_CPU_ACCUMULATE_INT8_H_

#include <type_traits>
#include <utility>

#include "inlining.h"
#include "kernel.h"

namespace lmkan::cpu {
namespace {

// Weights of the four corners times `one`; see Weights in accumulate.h for the lanes.
template <class V>
struct ScaledWeights {
  LMKAN_ALWAYS_INLINE ScaledWeights(const CellRecord& record, float one) {
    const typename V::Reg d1 = V::LoadFour(record.position1);
    const typename V::Reg d2 = V::LoadFour(record.position2);
    const typename V::Reg e2 = V::Subtract(V::One(), d2);
    const typename V::Reg high = V::Multiply(d1, V::Broadcast(one));
    const typename V::Reg low = V::Subtract(V::Broadcast(one), high);
    corner[0] = V::Multiply(low, e2);
    corner[1] = V::Multiply(low, d2);
    corner[2] = V::Multiply(high, e2);
    corner[3] = V::Multiply(high, d2);
  }
  typename V::Reg corner[4];
};

// See CellRecord.
template <class V>
void RoundWeights(const RoundWeightsArgs& args) {
  CellRecord* record = args.records;
  for (int64_t r = 0; r < args.rows; ++r, ++record) {
    float one = kWeightOne;
    if (!V::PositionsFit(*record, args.num_pairs, kFarthestFit)) {
      record->cell[0] = ~record->cell[0];
      if (args.num_pairs == 1) record->cell[1] = 0;
      if (!V::PositionsFit(*record, args.num_pairs, kFarthestCoarseFit)) {
        record->cell[1] = ~record->cell[1];
        continue;
      }
      one = kWeightOne / kCoarseUnit;
    }
    const ScaledWeights<V> weights(*record, one);
    V::StoreFour(record->weights1, V::RoundPair(weights.corner[0], weights.corner[1]));
    V::StoreFour(record->weights2, V::RoundPair(weights.corner[2], weights.corner[3]));
  }
}

// A block of outputs is added in parts: vector v of part p has outputs (v * kParts + p) * V::kLanes
// and on, from entries that begin p * kPartEntries behind those of part 0.
template <class V, class T>
struct Int8Parts {
  static constexpr int kParts = 1;
  static constexpr int kPartEntries = 0;
};

// More than four vectors of sums would not stay in registers.
template <class V>
struct Int8Parts<V, Int8Entry> {
  static constexpr int kVectors = 4;
  static constexpr int kParts = kCompactBlockOutputs / (kVectors * V::kLanes);
  static constexpr int kPartEntries = kCompactBlockOutputs / kParts;
};

// Entries of a line beside their right neighbours, as 16-bit integers, for kVectors vectors.
template <class V, int kVectors>
struct Int8Line {
  LMKAN_ALWAYS_INLINE explicit Int8Line(const Int8Pair* corner) {
    for (int v = 0; v < kVectors; ++v) entries[v] = V::WidenPairs(corner + v * V::kLanes);
  }
  // Times kEntryMultiple.
  LMKAN_ALWAYS_INLINE explicit Int8Line(const Int8Entry* corner) {
    const auto low = V::InterleaveWordsLow(corner, corner + kCompactBlockOutputs);
    const auto high = V::InterleaveWordsHigh(corner, corner + kCompactBlockOutputs);
    entries[0] = V::LowerBytes(low);
    entries[1] = V::LowerBytes(high);
    entries[2] = V::UpperBytes(low);
    entries[3] = V::UpperBytes(high);
  }
  typename V::IntReg entries[kVectors];
};

// Adds pair kPair of a group to the sums, in integers.
template <class V, int kPair, bool kCoarse, class T, int kVectors>
LMKAN_ALWAYS_INLINE void AddInt8Pair(const T* corner, int64_t line, const float* scales,
                                     const CellRecord& record, typename V::Reg (&sums)[kVectors]) {
  constexpr int kStep = Int8Parts<V, T>::kParts * V::kLanes;
  // Loads, because here the multiplications are the bottleneck, not the load ports.
  const typename V::IntReg weights1 = V::BroadcastPair(record.weights1[kPair]);
  const typename V::IntReg weights2 = V::BroadcastPair(record.weights2[kPair]);
  const Int8Line<V, kVectors> first(corner), second(corner + line);
  for (int v = 0; v < kVectors; ++v) {
    auto entries1 = first.entries[v];
    auto entries2 = second.entries[v];
    if constexpr (kCoarse && std::is_same_v<T, Int8Entry>) {
      entries1 = V::DivideHalves(entries1);
      entries2 = V::DivideHalves(entries2);
    }
    const auto value =
        V::MultiplyAddPairs(weights2, entries2, V::MultiplyPairs(weights1, entries1));
    sums[v] = V::MultiplyAdd(V::ToFloats(value), V::Load(scales + v * kStep), sums[v]);
  }
}

// A whole group in float32, for any weights. Rare, so it is not inlined: sums are in memory.
template <class V, class T, int kVectors>
LMKAN_NEVER_INLINE void AddInt8GroupAsFloats(const T* slices, const float* scales,
                                             const TableStrides& strides, CellRecord record,
                                             int num_pairs, float* sums) {
  constexpr int kStep = Int8Parts<V, T>::kParts * V::kLanes;
  for (int p = 0; p < 2; ++p) record.cell[p] = ~record.cell[p];
  const ScaledWeights<V> weights(record, kWeightOne);
  float corner_weights[4][V::kLanes];
  for (int c = 0; c < 4; ++c) V::Store(corner_weights[c], weights.corner[c]);
  for (int p = 0; p < num_pairs; ++p, slices += strides.pair, scales += kVectors * kStep) {
    const T* corner = slices + record.cell[p] * strides.cell;
    const Int8Line<V, kVectors> lines[2] = {Int8Line<V, kVectors>(corner),
                                            Int8Line<V, kVectors>(corner + strides.line)};
    for (int v = 0; v < kVectors; ++v) {
      typename V::Reg value = V::Zero();
      for (int c = 0; c < 4; ++c) {
        const auto pairs = lines[c / 2].entries[v];
        const auto entries = V::ToFloats(c % 2 == 0 ? V::LowHalves(pairs) : V::HighHalves(pairs));
        value = V::MultiplyAdd(V::Broadcast(corner_weights[c][p]), entries, value);
      }
      float* sum = sums + v * V::kLanes;
      V::Store(sum, V::MultiplyAdd(value, V::Load(scales + v * kStep), V::Load(sum)));
    }
  }
}

// Adds the pairs kPair... of a group, whose weights are rounded.
template <class V, bool kCoarse, class T, class Prefetch, int kVectors, int... kPair>
LMKAN_ALWAYS_INLINE void AddRoundedPairs(const T* slices, const float* scales,
                                         const TableStrides& strides, const CellRecord& record,
                                         int32_t first_cell, Prefetch& prefetcher,
                                         typename V::Reg (&sums)[kVectors],
                                         std::integer_sequence<int, kPair...>) {
  ((AddInt8Pair<V, kPair, kCoarse>(
        slices + kPair * strides.pair +
            (kPair == 0 ? first_cell : record.cell[kPair]) * strides.cell,
        strides.line, scales + kPair * kVectors * Int8Parts<V, T>::kParts * V::kLanes, record,
        sums),
    prefetcher.Pair(kPair)),
   ...);
}

// Adds the pairs kPair... of a group.
template <class V, class T, class Prefetch, int kVectors, int... kPair>
LMKAN_ALWAYS_INLINE void AddInt8Pairs(const T* slices, const float* scales,
                                      const TableStrides& strides, const CellRecord& record,
                                      typename V::Reg (&sums)[kVectors], Prefetch& prefetcher,
                                      std::integer_sequence<int, kPair...> pairs) {
  if (__builtin_expect(record.cell[0] >= 0, 1)) {
    AddRoundedPairs<V, false>(slices, scales, strides, record, record.cell[0], prefetcher, sums,
                              pairs);
    return;
  }
  if (record.cell[1] >= 0) {
    typename V::Reg values[kVectors];
    for (int v = 0; v < kVectors; ++v) values[v] = V::Zero();
    AddRoundedPairs<V, true>(slices, scales, strides, record, ~record.cell[0], prefetcher, values,
                             pairs);
    constexpr float kUnit =
        std::is_same_v<T, Int8Entry> ? kCoarseUnit * kHalvesDivisor : kCoarseUnit;
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = V::MultiplyAdd(V::Broadcast(kUnit), values[v], sums[v]);
    }
    return;
  }
  float buffer[kVectors * V::kLanes];
  for (int v = 0; v < kVectors; ++v) V::Store(buffer + v * V::kLanes, sums[v]);
  AddInt8GroupAsFloats<V, T, kVectors>(slices, scales, strides, record, sizeof...(kPair), buffer);
  (prefetcher.Pair(kPair), ...);
  for (int v = 0; v < kVectors; ++v) sums[v] = V::Load(buffer + v * V::kLanes);
}

}  // namespace
}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_ACCUMULATE_INT8_H_
