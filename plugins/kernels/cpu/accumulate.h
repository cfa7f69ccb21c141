// accumulate and store for one instruction set, written once over a vector type.
//
// A kernel file defines its vector type V (in an anonymous namespace: the same template compiled
// for two instruction sets must never be merged by the linker) and instantiates the templates:
//   V::kLanes                 float32 values in a vector, a multiple of 4
//   V::Reg                    the register type
//   V::Zero()  V::One()
//   V::Load(const float*)     and Load(const Float16*), Load(const BFloat16*): widen to float32
//   V::Store(float*, Reg)     and Store(Float16*, ...), Store(BFloat16*, ...): to nearest even
//   V::LoadFour(const float*) four values, repeated in every quarter of four lanes
//   V::Repeat<i>(Reg)         lane i of each quarter in all four lanes of that quarter
//   V::Subtract  V::Multiply  V::MultiplyAdd(a, b, c) = a * b + c
// and for INT8 tables what accumulate_int8.h says.
//
// Every path adds up an output in the same order (the corners of a pair in the table's order, then
// the pairs ascending), so a row's result depends neither on the batch it came in nor on how the
// work was split.
#ifndef LMKAN_KERNELS_CPU_ACCUMULATE_H_
#define LMKAN_KERNELS_CPU_ACCUMULATE_H_

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "accumulate_int8.h"
#include "float16.h"
#include "inlining.h"
#include "kernel.h"
#include "prefetch.h"

namespace lmkan::cpu {
namespace {

// The corner weights of a record. Lane p of each quarter belongs to the group's pair p: one
// register serves four pairs, and a shuffle spreads one pair's weight. The load ports are the
// bottleneck, so that is cheaper than a broadcast load for each weight.
template <class V>
struct Weights {
  LMKAN_ALWAYS_INLINE explicit Weights(const CellRecord& record) {
    const typename V::Reg d1 = V::LoadFour(record.position1);
    const typename V::Reg d2 = V::LoadFour(record.position2);
    const typename V::Reg e1 = V::Subtract(V::One(), d1);
    const typename V::Reg e2 = V::Subtract(V::One(), d2);
    corner[0] = V::Multiply(e1, e2);
    corner[1] = V::Multiply(e1, d2);
    corner[2] = V::Multiply(d1, e2);
    corner[3] = V::Multiply(d1, d2);
  }
  typename V::Reg corner[4];
};

// Where vector v of a strip of blocks is, kBlockVectors of which belong to each block.
template <class V, int kBlockVectors>
LMKAN_ALWAYS_INLINE int64_t VectorOffset(const TableStrides& strides, int v) {
  return v / kBlockVectors * strides.block + v % kBlockVectors * V::kLanes;
}

// Adds pair kPair of a group to the sums of kVectors * V::kLanes outputs.
template <class V, class T, int kBlockVectors, int kPair, int kVectors>
LMKAN_ALWAYS_INLINE void AddPair(const T* first_corner, const TableStrides& strides,
                                 const Weights<V>& weights, typename V::Reg (&sums)[kVectors]) {
  const T* corners[4] = {first_corner, first_corner + strides.cell, first_corner + strides.line,
                         first_corner + strides.line + strides.cell};
  // Straight into the sums: a register for each pair's own value would cost an addition more, and
  // while one row's additions wait for one another the processor is at the next row.
  for (int c = 0; c < 4; ++c) {
    const typename V::Reg weight = V::template Repeat<kPair>(weights.corner[c]);
    for (int v = 0; v < kVectors; ++v) {
      const T* entries = corners[c] + VectorOffset<V, kBlockVectors>(strides, v);
      sums[v] = V::MultiplyAdd(weight, V::Load(entries), sums[v]);
    }
  }
}

// Adds the pairs kPair... of a group.
template <class V, class T, int kBlockVectors, class Prefetch, int kVectors, int... kPair>
LMKAN_ALWAYS_INLINE void AddPairs(const T* slices, const TableStrides& strides,
                                  const CellRecord& record, typename V::Reg (&sums)[kVectors],
                                  Prefetch& prefetcher, std::integer_sequence<int, kPair...>) {
  const Weights<V> weights(record);
  ((AddPair<V, T, kBlockVectors, kPair>(
        slices + kPair * strides.pair + record.cell[kPair] * strides.cell, strides, weights, sums),
    prefetcher.Pair(kPair)),
   ...);
}

// Adds the first kPairs pairs of a group.
template <class V, class T, int kBlockVectors, int kPairs, class Prefetch, int kVectors>
LMKAN_ALWAYS_INLINE void AddGroup(const T* slices, const float* scales, const TableStrides& strides,
                                  const CellRecord& record, Prefetch& prefetcher,
                                  typename V::Reg (&sums)[kVectors]) {
  constexpr std::make_integer_sequence<int, kPairs> pairs;
  if constexpr (kIsInt8<T>) {
    static_assert(kBlockVectors == kVectors, "one block");
    AddInt8Pairs<V>(slices, scales, strides, record, sums, prefetcher, pairs);
  } else {
    static_cast<void>(scales);
    AddPairs<V, T, kBlockVectors>(slices, strides, record, sums, prefetcher, pairs);
  }
}

// One group of pairs, all rows.
template <class V, class T, int kVectors, int kPairs, class Prefetch>
void AccumulateGroup(const AccumulateArgs& args) {
  using Parts = Int8Parts<V, T>;
  const T* slices = static_cast<const T*>(args.slices);
  const float* scales = args.scales;
  const TableStrides strides = args.strides;
  Prefetch prefetcher(args);
  const CellRecord* record = args.records;
  // Copies, because the compiler must assume that the stores below change args.
  const bool is_first = args.is_first;
  const int64_t rows = args.rows;
  const float* in = args.sums;
  float* out = args.out;
  const int64_t out_stride = args.out_stride;
  for (int64_t r = 0; r < rows; ++r, ++record) {
    for (int part = 0; part < Parts::kParts; ++part) {
      typename V::Reg sums[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        sums[v] = is_first ? V::Zero() : V::Load(in + (v * Parts::kParts + part) * V::kLanes);
      }
      AddGroup<V, T, kVectors, kPairs>(slices + part * Parts::kPartEntries,
                                       scales + part * V::kLanes, strides, *record, prefetcher,
                                       sums);
      for (int v = 0; v < kVectors; ++v) {
        V::Store(out + (v * Parts::kParts + part) * V::kLanes, sums[v]);
      }
    }
    in += Parts::kParts * kVectors * V::kLanes;
    out += out_stride;
    // After the row, not before it: its loads come first.
    prefetcher.Row();
  }
}

// One row, all groups, one part: blocks of kBlockVectors vectors, kVectors in all.
template <class V, class T, int kBlockVectors, int kVectors>
LMKAN_ALWAYS_INLINE void AccumulateRowPart(const AccumulateRowArgs& args, int part) {
  using Parts = Int8Parts<V, T>;
  typename V::Reg sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = V::Zero();
  const T* slices = static_cast<const T*>(args.slices) + part * Parts::kPartEntries;
  const NoPrefetcher prefetcher;
  const float* scales = args.scales + part * V::kLanes;
  const CellRecord* record = args.records;
  const TableStrides strides = args.strides;
  for (int64_t g = args.num_pairs / kGroupPairs; g > 0; --g) {
    AddGroup<V, T, kBlockVectors, kGroupPairs>(slices, scales, strides, *record, prefetcher, sums);
    slices += kGroupPairs * strides.pair;
    if (kIsInt8<T>) scales += kGroupPairs * Parts::kParts * kVectors * V::kLanes;
    record += args.record_stride;
  }
  switch (args.num_pairs % kGroupPairs) {
    case 1:
      AddGroup<V, T, kBlockVectors, 1>(slices, scales, strides, *record, prefetcher, sums);
      break;
    case 2:
      AddGroup<V, T, kBlockVectors, 2>(slices, scales, strides, *record, prefetcher, sums);
      break;
    case 3:
      AddGroup<V, T, kBlockVectors, 3>(slices, scales, strides, *record, prefetcher, sums);
      break;
    default:
      break;
  }
  for (int v = 0; v < kVectors; ++v) {
    V::Store(args.sums + (v * Parts::kParts + part) * V::kLanes, sums[v]);
  }
}

template <class V, class T, int kBlockVectors, int kVectors>
void AccumulateRow(const AccumulateRowArgs& args) {
  for (int part = 0; part < Int8Parts<V, T>::kParts; ++part) {
    AccumulateRowPart<V, T, kBlockVectors, kVectors>(args, part);
  }
}

template <class V, class T, int kVectors>
void AccumulateGroupOf(const AccumulateArgs& args) {
  using Line = SpreadPrefetcher<Int8Parts<V, T>::kParts, true>;
  using Lines = SpreadPrefetcher<Int8Parts<V, T>::kParts, false>;
  switch (args.num_pairs) {
    case 1:
      return AccumulateGroup<V, T, kVectors, 1, RowPrefetcher<T>>(args);
    case 2:
      return AccumulateGroup<V, T, kVectors, 2, RowPrefetcher<T>>(args);
    case 3:
      return AccumulateGroup<V, T, kVectors, 3, RowPrefetcher<T>>(args);
    default:
      if (Line::Serves(args)) return AccumulateGroup<V, T, kVectors, kGroupPairs, Line>(args);
      if (Lines::Serves(args)) return AccumulateGroup<V, T, kVectors, kGroupPairs, Lines>(args);
      if constexpr (Int8Parts<V, T>::kParts > 1) {
        if (args.next_records != nullptr) {
          return AccumulateGroup<V, T, kVectors, kGroupPairs, SpreadCornerPrefetcher<T>>(args);
        }
      }
      return AccumulateGroup<V, T, kVectors, kGroupPairs, RowPrefetcher<T>>(args);
  }
}

// Calls function with `vectors`, 1 ... kMost, as a compile-time constant.
template <int kMost, class Function>
inline void WithVectors(int64_t vectors, const Function& function) {
  if constexpr (kMost > 1) {
    if (vectors < kMost) return WithVectors<kMost - 1>(vectors, function);
  }
  function(std::integral_constant<int, kMost>());
}

template <class V, class T>
void Accumulate(const AccumulateArgs& args) {
  WithVectors<kMaxBlockOutputs / V::kLanes>(args.width / V::kLanes, [&args](auto vectors) {
    AccumulateGroupOf<V, T, decltype(vectors)::value>(args);
  });
}

// Compact INT8 tables, whose blocks all have the same width.
template <class V>
void AccumulateCompact(const AccumulateArgs& args) {
  AccumulateGroupOf<V, Int8Entry, Int8Parts<V, Int8Entry>::kVectors>(args);
}

template <class V>
void AccumulateOneRowOfCompact(const AccumulateRowArgs& args) {
  constexpr int kVectors = Int8Parts<V, Int8Entry>::kVectors;
  AccumulateRow<V, Int8Entry, kVectors, kVectors>(args);
}

template <class V, class T>
void AccumulateOneRow(const AccumulateRowArgs& args) {
  WithVectors<kMaxBlockOutputs / V::kLanes>(args.width / V::kLanes, [&args](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    AccumulateRow<V, T, kVectors, kVectors>(args);
  });
}

// Up to kMostBlocks blocks of kBlockVectors vectors: the weights are computed once for all of them.
template <class V, class T, int kBlockVectors, int kMostBlocks>
void AccumulateOneRowOfBlocks(const AccumulateRowArgs& args) {
  WithVectors<kMostBlocks>(args.num_blocks, [&args](auto blocks) {
    AccumulateRow<V, T, kBlockVectors, kBlockVectors* decltype(blocks)::value>(args);
  });
}

template <class V, class T>
void StoreRows(const StoreArgs& args) {
  const int64_t whole = args.outputs / V::kLanes * V::kLanes;
  const float* sums = args.sums;
  T* y = static_cast<T*>(args.y);
  for (int64_t r = 0; r < args.rows; ++r, sums += args.width, y += args.y_stride) {
    for (int64_t o = 0; o < whole; o += V::kLanes) V::Store(y + o, V::Load(sums + o));
    for (int64_t o = whole; o < args.outputs; ++o) FromFloat(sums[o], y + o);
  }
}

}  // namespace
}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_ACCUMULATE_H_
