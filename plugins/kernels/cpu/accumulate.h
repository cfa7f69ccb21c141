// accumulate and store for one instruction set, written once over a vector type.
//
// A kernel file defines its vector type V (in an anonymous namespace: the same template compiled
// for two instruction sets must never be merged by the linker) and instantiates Accumulate<V, T>:
//   V::kLanes                 float32 values in a vector
//   V::Reg                    the register type
//   V::Zero()  V::Broadcast(const float*)
//   V::Load(const float*)     and Load(const Float16*), Load(const BFloat16*): widen to float32
//   V::Store(float*, Reg)
//   V::MultiplyAdd(a, b, c)   a * b + c
//
// Every path adds up the corners of an output in the same order (pairs ascending, corners in the
// order of CellRecord), so a row's result depends neither on the batch it came in nor on how the
// work was split.
#ifndef LMKAN_KERNELS_CPU_ACCUMULATE_H_
#define LMKAN_KERNELS_CPU_ACCUMULATE_H_

#include <cstddef>
#include <cstdint>

#include "float16.h"
#include "kernel.h"

namespace lmkan::cpu {
namespace {

// Below this many rows the sums stay in registers over all pairs; from it on, the pairs of a group
// stay in the cache over all rows.
inline constexpr int64_t kFewRows = 6;

// Adds the contribution of one pair to the sums of kVectors * V::kLanes outputs.
template <class V, class T, int kVectors>
inline void AddPair(const T* corner, int64_t cell_stride, int64_t line_stride,
                    const CellRecord& record, int pair, typename V::Reg (&sums)[kVectors]) {
  const T* rows[4] = {corner, corner + cell_stride, corner + line_stride,
                      corner + line_stride + cell_stride};
  for (int c = 0; c < 4; ++c) {
    const typename V::Reg weight = V::Broadcast(&record.weight[c][pair]);
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = V::MultiplyAdd(weight, V::Load(rows[c] + v * V::kLanes), sums[v]);
    }
  }
}

// All rows, kPairs pairs of one group.
template <class V, class T, int kVectors, int kPairs>
void AccumulateGroup(const AccumulateArgs& args, int64_t group, int64_t column) {
  const T* slices =
      static_cast<const T*>(args.slices) + group * kGroupPairs * args.pair_stride + column;
  const CellRecord* records = args.records + group * args.rows;
  float* out = args.sums + column;
  for (int64_t r = 0; r < args.rows; ++r, out += args.width) {
    const CellRecord& record = records[r];
    typename V::Reg sums[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = group == 0 ? V::Zero() : V::Load(out + v * V::kLanes);
    }
    for (int p = 0; p < kPairs; ++p) {
      AddPair<V, T, kVectors>(slices + p * args.pair_stride + record.cell[p] * args.cell_stride,
                              args.cell_stride, args.line_stride, record, p, sums);
    }
    for (int v = 0; v < kVectors; ++v) V::Store(out + v * V::kLanes, sums[v]);
  }
}

// One row, all pairs.
template <class V, class T, int kVectors>
void AccumulateRow(const AccumulateArgs& args, int64_t row, int64_t column) {
  typename V::Reg sums[kVectors];
  for (int v = 0; v < kVectors; ++v) sums[v] = V::Zero();
  const T* slice = static_cast<const T*>(args.slices) + column;
  for (int64_t pair = 0; pair < args.num_pairs; ++pair, slice += args.pair_stride) {
    const CellRecord& record = args.records[pair / kGroupPairs * args.rows + row];
    const int p = static_cast<int>(pair % kGroupPairs);
    AddPair<V, T, kVectors>(slice + record.cell[p] * args.cell_stride, args.cell_stride,
                            args.line_stride, record, p, sums);
  }
  float* out = args.sums + row * args.width + column;
  for (int v = 0; v < kVectors; ++v) V::Store(out + v * V::kLanes, sums[v]);
}

template <class V, class T, int kVectors>
void AccumulateColumns(const AccumulateArgs& args, int64_t column) {
  if (args.rows < kFewRows) {
    for (int64_t r = 0; r < args.rows; ++r) AccumulateRow<V, T, kVectors>(args, r, column);
    return;
  }
  const int64_t full_groups = args.num_pairs / kGroupPairs;
  for (int64_t g = 0; g < full_groups; ++g) {
    AccumulateGroup<V, T, kVectors, kGroupPairs>(args, g, column);
  }
  switch (args.num_pairs % kGroupPairs) {
    case 1:
      return AccumulateGroup<V, T, kVectors, 1>(args, full_groups, column);
    case 2:
      return AccumulateGroup<V, T, kVectors, 2>(args, full_groups, column);
    case 3:
      return AccumulateGroup<V, T, kVectors, 3>(args, full_groups, column);
    default:
      return;
  }
}

// Splits a block into runs of vectors that fit the registers.
template <class V, class T>
void Accumulate(const AccumulateArgs& args) {
  constexpr int kWidest = kMaxBlockOutputs / V::kLanes < 8 ? kMaxBlockOutputs / V::kLanes : 8;
  int64_t column = 0;
  for (; column + kWidest * V::kLanes <= args.width; column += kWidest * V::kLanes) {
    AccumulateColumns<V, T, kWidest>(args, column);
  }
  int64_t vectors = (args.width - column) / V::kLanes;
  if (vectors >= 4) {
    AccumulateColumns<V, T, 4>(args, column);
    column += 4 * V::kLanes;
    vectors -= 4;
  }
  if (vectors == 3) return AccumulateColumns<V, T, 3>(args, column);
  if (vectors == 2) return AccumulateColumns<V, T, 2>(args, column);
  if (vectors == 1) return AccumulateColumns<V, T, 1>(args, column);
}

template <class T>
void StoreRows(const StoreArgs& args) {
  const float* sums = args.sums;
  T* y = static_cast<T*>(args.y);
  for (int64_t r = 0; r < args.rows; ++r, sums += args.width, y += args.y_stride) {
    for (int64_t o = 0; o < args.outputs; ++o) FromFloat(sums[o], y + o);
  }
}

}  // namespace
}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_ACCUMULATE_H_
