// Kernels in plain C++: the fallback where no SIMD kernel fits, and the model for the others.
#include <cmath>

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

  struct IntReg {
    int32_t lane[kLanes];
  };
  static bool PositionsFit(const CellRecord& record, int64_t pairs, float farthest) {
    bool fit = true;
    for (int64_t p = 0; p < pairs; ++p) {
      fit &= std::fabs(record.position1[p] - 0.5f) <= farthest;
      fit &= std::fabs(record.position2[p] - 0.5f) <= farthest;
    }
    return fit;
  }
  static int32_t PairOf(int32_t low, int32_t high) {
    return static_cast<int32_t>((static_cast<uint32_t>(high) << 16) |
                                (static_cast<uint32_t>(low) & 0xffffu));
  }
  static int32_t Low(int32_t pair) { return static_cast<int16_t>(pair & 0xffff); }
  static int32_t High(int32_t pair) { return pair >> 16; }
  static IntReg RoundPair(Reg a, Reg b) {
    IntReg result;
    for (int i = 0; i < kLanes; ++i) {
      // Lanes without a pair may hold anything.
      result.lane[i] = PairOf(RoundToInt16(a.lane[i]), RoundToInt16(b.lane[i]));
    }
    return result;
  }
  static int32_t RoundToInt16(float value) {
    return std::fabs(value) < 32768.0f ? static_cast<int32_t>(std::nearbyint(value)) : 0;
  }
  static void StoreFour(int32_t* out, IntReg reg) {
    for (int i = 0; i < kLanes; ++i) out[i] = reg.lane[i];
  }
  static IntReg BroadcastPair(int32_t pair) { return {{pair, pair, pair, pair}}; }
  static IntReg WidenPairs(const Int8Pair* pairs) {
    IntReg result;
    for (int i = 0; i < kLanes; ++i) {
      result.lane[i] = PairOf(pairs[i].corner[0], pairs[i].corner[1]);
    }
    return result;
  }
  static IntReg MultiplyPairs(IntReg a, IntReg b) {
    for (int i = 0; i < kLanes; ++i) {
      a.lane[i] = Low(a.lane[i]) * Low(b.lane[i]) + High(a.lane[i]) * High(b.lane[i]);
    }
    return a;
  }
  static IntReg MultiplyAddPairs(IntReg a, IntReg b, IntReg c) {
    a = MultiplyPairs(a, b);
    for (int i = 0; i < kLanes; ++i) a.lane[i] += c.lane[i];
    return a;
  }
  static Reg ToFloats(IntReg reg) {
    Reg result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = static_cast<float>(reg.lane[i]);
    return result;
  }
  static IntReg LowHalves(IntReg reg) {
    for (int32_t& lane : reg.lane) lane = Low(lane);
    return reg;
  }
  static IntReg HighHalves(IntReg reg) {
    for (int32_t& lane : reg.lane) lane = High(lane);
    return reg;
  }
};

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
      record.position1[p] = d1;
      record.position2[p] = d2;
    }
  }
}

}  // namespace

const KernelSet kPortableKernels = {
    "portable",
    PortableVector::kLanes,
    {FindCells<float>, FindCells<Float16>, FindCells<BFloat16>},
    RoundWeights<PortableVector>,
    {Accumulate<PortableVector, float>, Accumulate<PortableVector, Float16>,
     Accumulate<PortableVector, BFloat16>, Accumulate<PortableVector, Int8Pair>, nullptr},
    {AccumulateOneRow<PortableVector, float>, AccumulateOneRow<PortableVector, Float16>,
     AccumulateOneRow<PortableVector, BFloat16>, AccumulateOneRow<PortableVector, Int8Pair>,
     nullptr},
    {1, 1, 1, 1, 1},
    KernelSet::kNeverCompact,
    {StoreRows<PortableVector, float>, StoreRows<PortableVector, Float16>,
     StoreRows<PortableVector, BFloat16>},
};

}  // namespace lmkan::cpu
