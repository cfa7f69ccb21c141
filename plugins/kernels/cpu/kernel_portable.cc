// Kernels in plain C++: the fallback where no SIMD kernel fits, and the model for the others.
#include <cmath>
#include <cstring>

#include "accumulate.h"

namespace lmkan::cpu {
namespace {

// Four lanes that compilers turn into one vector register where the target has one.
struct PortableVector {
  static constexpr int kLanes = 4;
  struct Reg {
    float lane[kLanes];
  };
  static Reg Zero() { return {}; }
  static Reg One() { return Broadcast(1.0f); }
  static Reg Broadcast(float value) { return {{value, value, value, value}}; }
  template <class T>
  static Reg Load(const T* values) {
    return {{ToFloat(values[0]), ToFloat(values[1]), ToFloat(values[2]), ToFloat(values[3])}};
  }
  static Reg LoadFour(const float* values) { return Load(values); }
  template <class T>
  static void Store(T* out, Reg reg) {
    for (int i = 0; i < kLanes; ++i) FromFloat(reg.lane[i], out + i);
  }
  template <int kLane>
  static Reg Repeat(Reg reg) {
    return {{reg.lane[kLane], reg.lane[kLane], reg.lane[kLane], reg.lane[kLane]}};
  }
  static Reg Subtract(Reg a, Reg b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
  static Reg Multiply(Reg a, Reg b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) {
    for (int i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
};

// Sixteen outputs of an INT8 table; see accumulate_int8.h.
struct PortableBytes : PortableVector {
  static constexpr int kOutputs = 16;
  struct Bytes {
    int8_t lane[kOutputs];
  };
  struct Words {
    int16_t lane[kOutputs / 2];
  };
  struct Ints {
    int32_t lane[kLanes];
  };
  static Bytes LoadBytes(const int8_t* bytes) {
    Bytes result;
    std::memcpy(result.lane, bytes, sizeof result.lane);
    return result;
  }
  static Words LoadWords(const int16_t* words) {
    Words result;
    std::memcpy(result.lane, words, sizeof result.lane);
    return result;
  }
  static Words ZeroWords() { return {}; }
  template <class Vector>
  static Vector Repeat(int32_t value) {
    Vector result;
    for (size_t i = 0; i < sizeof result; i += sizeof value) {
      std::memcpy(reinterpret_cast<char*>(result.lane) + i, &value, sizeof value);
    }
    return result;
  }
  static Words RepeatWord(int16_t word) {
    Words result;
    for (int16_t& lane : result.lane) lane = word;
    return result;
  }
  static Words RepeatAsWords(int32_t words) { return Repeat<Words>(words); }
  template <class Vector>
  static Vector Interleave(const Vector& a, const Vector& b, int first) {
    constexpr int kElements = sizeof a.lane / sizeof a.lane[0];
    Vector result;
    for (int i = 0; i < kElements; ++i) {
      result.lane[i] = (i % 2 == 0 ? a : b).lane[first * kElements / 2 + i / 2];
    }
    return result;
  }
  static Bytes InterleaveBytesLow(const Bytes& a, const Bytes& b) { return Interleave(a, b, 0); }
  static Bytes InterleaveBytesHigh(const Bytes& a, const Bytes& b) { return Interleave(a, b, 1); }
  static Words InterleaveWordsLow(const Words& a, const Words& b) { return Interleave(a, b, 0); }
  static Words InterleaveWordsHigh(const Words& a, const Words& b) { return Interleave(a, b, 1); }
  static Words MultiplyHigh(Words a, const Words& b) {
    for (int i = 0; i < kOutputs / 2; ++i) {
      a.lane[i] = static_cast<int16_t>((a.lane[i] * b.lane[i] + (1 << 14)) >> 15);
    }
    return a;
  }
  static Words Add(Words a, const Words& b) {
    for (int i = 0; i < kOutputs / 2; ++i) {
      a.lane[i] = static_cast<int16_t>(a.lane[i] + b.lane[i]);
    }
    return a;
  }
  static Ints MultiplyWords(const Words& a, const Words& b) {
    return MultiplyAddWords(a, b, Ints{});
  }
  static Ints MultiplyAddWords(const Words& a, const Words& b, Ints c) {
    for (int i = 0; i < kLanes; ++i) {
      c.lane[i] += a.lane[2 * i] * b.lane[2 * i] + a.lane[2 * i + 1] * b.lane[2 * i + 1];
    }
    return c;
  }
  static Reg ToFloats(const Ints& ints) {
    Reg result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = static_cast<float>(ints.lane[i]);
    return result;
  }

  static Words Widen(const Bytes& bytes, int first) {
    Words result;
    for (int i = 0; i < kOutputs / 2; ++i) result.lane[i] = bytes.lane[first + i];
    return result;
  }
  static Words Shift(Words words) {
    for (int16_t& lane : words.lane) lane = static_cast<int16_t>(lane * 256);
    return words;
  }
  static Words ShiftLow(const Bytes& bytes) { return Shift(WidenLow(bytes)); }
  static Words ShiftHigh(const Bytes& bytes) { return Shift(WidenHigh(bytes)); }
  static Words WidenLow(const Bytes& bytes) { return Widen(bytes, 0); }
  static Words WidenHigh(const Bytes& bytes) { return Widen(bytes, kOutputs / 2); }
  static Ints EverySecond(const Words& words, int first) {
    Ints result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = words.lane[2 * i + first];
    return result;
  }
  static Ints FirstOfTwo(const Words& words) { return EverySecond(words, 0); }
  static Ints SecondOfTwo(const Words& words) { return EverySecond(words, 1); }
};

struct HalfPortableBytes : PortableBytes {
  static constexpr int kOutputs = 8;
  static Bytes LoadBytes(const int8_t* bytes) {
    Bytes result = {};
    std::memcpy(result.lane, bytes, kOutputs);
    return result;
  }
};

void AccumulateInt8Portable(const AccumulateArgs& args) {
  if (args.width == PortableBytes::kOutputs) return AccumulateInt8<PortableBytes>(args);
  AccumulateInt8<HalfPortableBytes>(args);
}

void AccumulateInt8RowPortable(const AccumulateRowArgs& args) {
  if (args.width == PortableBytes::kOutputs) return AccumulateInt8Row<PortableBytes>(args);
  AccumulateInt8Row<HalfPortableBytes>(args);
}

// The position in 1 / kWeightOne, or -1 where it is beyond the grid or NaN.
int32_t RoundPosition(float position) {
  const float scaled = position * kWeightOne;
  if (!(scaled >= -0.5f && scaled <= kWeightOne + 0.5f)) return -1;
  const auto rounded = static_cast<int32_t>(std::nearbyint(scaled));
  return rounded <= kWeightOne ? rounded : -1;
}

int64_t RoundPositions(const RoundPositionsArgs& args) {
  int64_t num_far = 0;
  for (int64_t r = 0; r < args.rows; ++r) {
    CellRecord& record = args.records[r];
    const CellRecord positions = record;
    for (int p = 0; p < args.num_pairs; ++p) {
      const int32_t first = RoundPosition(positions.position[0][p]);
      const int32_t second = RoundPosition(positions.position[1][p]);
      int16_t* weights = record.weights[p];
      if (first < 0 || second < 0) {
        std::memset(weights, 0, sizeof record.weights[p]);
        args.far_pairs[num_far++] =
            MakeFarPair(r, p, record.cell[p], positions.position[0][p], positions.position[1][p]);
        continue;
      }
      const int32_t both = (first * second + kWeightOne / 2) >> 14;
      weights[0] = static_cast<int16_t>(kWeightOne - first - second + both);
      weights[1] = static_cast<int16_t>(second - both);
      weights[2] = static_cast<int16_t>(first - both);
      weights[3] = static_cast<int16_t>(both);
    }
  }
  return num_far;
}

// Cell of x, and the position inside it: 0 ... 1, beyond that range in the two outermost cells.
inline int32_t FindCell(const Grid& grid, float x, float* position) {
  const float tail = 0.5f * std::exp(-std::fabs(x));
  const float level = (x > 0.0f ? 1.0f - tail : tail) * static_cast<float>(grid.num_grids);
  // The comparison is false for NaN, which so ends in cell 0.
  int32_t cell = level > 0.0f ? static_cast<int32_t>(level) : 0;
  if (cell > grid.num_grids - 1) cell = grid.num_grids - 1;
  *position = (x - grid.cells[cell].point) * grid.cells[cell].inverse_width;
  return cell;
}

template <class T>
void FindCells(const FindCellsArgs& args) {
  const T* x = static_cast<const T*>(args.x);
  const int64_t num_pairs = args.num_features / 2;
  for (int64_t r = 0; r < args.rows; ++r, x += args.num_features) {
    for (int64_t pair = 0; pair < num_pairs; ++pair) {
      float d1, d2;
      const int32_t i1 = FindCell(args.grid, ToFloat(x[2 * pair]), &d1);
      const int32_t i2 = FindCell(args.grid, ToFloat(x[2 * pair + 1]), &d2);
      CellRecord& record = args.records[pair / kGroupPairs * args.rows + r];
      const int64_t p = pair % kGroupPairs;
      record.cell[p] = i1 * (args.grid.num_grids + 1) + i2;
      record.position[0][p] = d1;
      record.position[1][p] = d2;
    }
  }
}

}  // namespace

const KernelSet kPortableKernels = {
    "portable",
    PortableVector::kLanes,
    PortableBytes::kOutputs,
    {FindCells<float>, FindCells<Float16>, FindCells<BFloat16>},
    RoundPositions,
    {Accumulate<PortableVector, float>, Accumulate<PortableVector, Float16>,
     Accumulate<PortableVector, BFloat16>, AccumulateInt8Portable},
    {AccumulateOneRow<PortableVector, float>, AccumulateOneRow<PortableVector, Float16>,
     AccumulateOneRow<PortableVector, BFloat16>, AccumulateInt8RowPortable},
    {1, 1, 1, 1},
    {StoreRows<PortableVector, float>, StoreRows<PortableVector, Float16>,
     StoreRows<PortableVector, BFloat16>},
};

}  // namespace lmkan::cpu
