// How a pass over the rows fetches what the next pass reads. Each way is a type: Pair is called
// after every pair of the group, Row after every row.
#ifndef LMKAN_KERNELS_CPU_PREFETCH_H_
#define LMKAN_KERNELS_CPU_PREFETCH_H_

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "inlining.h"
#include "kernel.h"

namespace lmkan::cpu {
namespace {

inline constexpr int64_t kCacheLine = 64;

// Asks for memory that the next pass reads; it may be any address.
inline void PrefetchToL2(uintptr_t address) {
#if defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
#else
  (void)address;
#endif
}

// Whether a pass fetches the next one's slice as a whole.
inline bool FetchesSlice(const AccumulateArgs& args) {
  return args.next_slices != nullptr && args.next_records == nullptr;
}

inline int64_t DivideRoundingUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cache lines of the next pass's slice.
inline int64_t SliceLines(const AccumulateArgs& args) {
  return DivideRoundingUp(args.next_bytes, kCacheLine);
}

struct NoPrefetcher {
  LMKAN_ALWAYS_INLINE void Pair(int /*pair*/) const {}
};

// Fetches the corners of the next pass's slice that a record points at.
template <class T>
class CornerPrefetcher {
 public:
  explicit CornerPrefetcher(const AccumulateArgs& args)
      : slices_(reinterpret_cast<uintptr_t>(args.next_slices)), strides_(args.next_strides) {}

  LMKAN_ALWAYS_INLINE void operator()(const CellRecord& record, int64_t pair) const {
    int64_t cell = record.cell[pair];
    if (kIsInt8<T> && cell < 0) cell = ~cell;
    const int64_t first = pair * strides_.pair + cell * strides_.cell;
    for (const int64_t line : {int64_t{0}, strides_.line}) {
      PrefetchToL2(slices_ + static_cast<uintptr_t>(first + line) * sizeof(T));
      if (std::is_same_v<T, Int8Pair>) continue;  // has its neighbour beside it
      PrefetchToL2(slices_ + static_cast<uintptr_t>(first + line + strides_.cell) * sizeof(T));
    }
  }

 private:
  uintptr_t slices_;
  TableStrides strides_;
};

// Walks through a slice in kStreams places at a time, a place a step. Memory gives more that way: a
// processor's own prefetcher follows each of them, and none of them across a page of 4 KB.
class Streams {
 public:
  static constexpr int kStreams = kGroupPairs;

  // Steps of `step` bytes, from the start of `bytes` bytes and of each further part of them.
  Streams(const void* start, int64_t bytes, int64_t step)
      : address_(reinterpret_cast<uintptr_t>(start)),
        hop_(bytes / kStreams),
        back_(step - (kStreams - 1) * hop_) {}

  uintptr_t address() const { return address_; }

  // From the place of this stream to that of the next one; after the last one follows the first.
  LMKAN_ALWAYS_INLINE void Advance(int stream) {
    address_ += static_cast<uintptr_t>(stream + 1 < kStreams ? hop_ : back_);
  }

 private:
  uintptr_t address_;
  int64_t hop_;
  int64_t back_;
};

// Fetches the next pass's slice a few lines a row, or a row's corners of it.
template <class T>
class RowPrefetcher {
 public:
  explicit RowPrefetcher(const AccumulateArgs& args)
      : address_(reinterpret_cast<uintptr_t>(args.next_slices)),
        lines_(FetchesSlice(args) ? DivideRoundingUp(SliceLines(args), args.rows) : 0),
        corners_(args),
        record_(args.next_slices == nullptr ? nullptr : args.next_records),
        pairs_(args.next_pairs) {}

  LMKAN_ALWAYS_INLINE void Pair(int /*pair*/) const {}

  LMKAN_ALWAYS_INLINE void Row() {
    for (int64_t i = 0; i < lines_; ++i, address_ += kCacheLine) PrefetchToL2(address_);
    if (record_ == nullptr) return;
    for (int64_t p = 0; p < pairs_; ++p) corners_(*record_, p);
    ++record_;
  }

 private:
  uintptr_t address_;
  int64_t lines_;
  CornerPrefetcher<T> corners_;
  const CellRecord* record_;
  int64_t pairs_;
};

// Fetches the next pass's slice in equal steps, of a line or of several. Spread evenly, prefetches
// leave the lookups more of the core's few outstanding misses than in bursts, and fewer seem to be
// dropped for want of one.
template <int kParts, bool kOneLine>
class SpreadPrefetcher {
 public:
  explicit SpreadPrefetcher(const AccumulateArgs& args)
      : lines_(DivideRoundingUp(Step(args), kCacheLine)),
        streams_(args.next_slices, args.next_bytes, Step(args)) {}

  // Whether there is more than a line for each row, as one is cheaper by row, and steps are of a
  // line or of several.
  static bool Serves(const AccumulateArgs& args) {
    return FetchesSlice(args) && SliceLines(args) > args.rows &&
           (Step(args) <= kCacheLine) == kOneLine;
  }

  LMKAN_ALWAYS_INLINE void Pair(int pair) {
    for (int64_t i = 0; i < (kOneLine ? 1 : lines_); ++i) {
      PrefetchToL2(streams_.address() + static_cast<uintptr_t>(i * kCacheLine));
    }
    streams_.Advance(pair);
  }

  LMKAN_ALWAYS_INLINE void Row() const {}

 private:
  static int64_t Step(const AccumulateArgs& args) {
    return DivideRoundingUp(args.next_bytes, args.rows * kParts * args.num_pairs);
  }

  int64_t lines_;
  Streams streams_;
};

// Fetches a row's corners of the next pass's slice, each pair's in every part: rows of several
// parts take long enough for that, and what a processor drops at first is asked for again.
template <class T>
class SpreadCornerPrefetcher {
 public:
  explicit SpreadCornerPrefetcher(const AccumulateArgs& args)
      : corners_(args), record_(args.next_records), pairs_(args.next_pairs) {}

  LMKAN_ALWAYS_INLINE void Pair(int pair) const {
    if (pair < pairs_) corners_(*record_, pair);
  }

  LMKAN_ALWAYS_INLINE void Row() { ++record_; }

 private:
  CornerPrefetcher<T> corners_;
  const CellRecord* record_;
  int64_t pairs_;
};

}  // namespace
}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_PREFETCH_H_
