// Kernels in plain C++: the fallback where no SIMD kernel fits, and the model for the others.
#include <cmath>
#include <cstring>

#include "accumulate.h"

namespace lmkan::cpu {
namespace {

// Values of T in a vector type of the compiler, which would need minutes for arrays of lanes.
template <class T, int kCount = 8>
using Lanes __attribute__((vector_size(kCount * sizeof(T)))) = T;

template <class Vector>
Vector LoadLanes(const void* values) {
  Vector result;
  std::memcpy(&result, values, sizeof result);
  return result;
}

struct PortableVector {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the low half of a lane comes first");
  static constexpr int kLanes = 8;
  using Reg = Lanes<float>;
  using IntReg = Lanes<int32_t>;
  using UnsignedReg = Lanes<uint32_t>;

  static Reg Zero() { return Broadcast(0.0f); }
  static Reg One() { return Broadcast(1.0f); }
  static Reg Broadcast(float value) { return value - Reg{}; }
  static Reg Load(const float* values) { return LoadLanes<Reg>(values); }
  static Reg Load(const BFloat16* values) {
    return reinterpret_cast<Reg>(LoadHalves(values) << 16);
  }
  // As ToFloat does, without comparisons, which GCC 12 takes apart into scalars.
  static Reg Load(const Float16* values) {
    const UnsignedReg halves = LoadHalves(values);
    const UnsignedReg rest = halves & 0x7fff;
    const Reg finite = reinterpret_cast<Reg>(rest << 13) * 0x1p112f;
    const IntReg is_special = (0x7bff - reinterpret_cast<IntReg>(rest)) >> 31;
    const UnsignedReg exponent = reinterpret_cast<UnsignedReg>(is_special) & 0x7f800000;
    const UnsignedReg sign = (halves & 0x8000) << 16;
    return reinterpret_cast<Reg>(reinterpret_cast<UnsignedReg>(finite) | exponent | sign);
  }
  static UnsignedReg LoadHalves(const void* values) {
    return __builtin_convertvector(LoadLanes<Lanes<uint16_t>>(values), UnsignedReg);
  }
  static Reg LoadFour(const float* values) {
    return Reg{values[0], values[1], values[2], values[3],
               values[0], values[1], values[2], values[3]};
  }
  template <class T>
  static void Store(T* out, Reg reg) {
    for (int i = 0; i < kLanes; ++i) FromFloat(reg[i], out + i);
  }
  template <int kLane>
  static Reg Repeat(Reg reg) {
    return Broadcast(reg[kLane]);
  }
  static Reg Subtract(Reg a, Reg b) { return a - b; }
  static Reg Multiply(Reg a, Reg b) { return a * b; }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return a * b + c; }

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
  static IntReg RoundPair(Reg a, Reg b) {
    IntReg result;
    for (int i = 0; i < kLanes; ++i) {
      // Lanes without a pair may hold anything.
      result[i] = PairOf(RoundToInt16(a[i]), RoundToInt16(b[i]));
    }
    return result;
  }
  static int32_t RoundToInt16(float value) {
    return std::fabs(value) < 32768.0f ? static_cast<int32_t>(std::nearbyint(value)) : 0;
  }
  static void StoreFour(int32_t* out, IntReg reg) { std::memcpy(out, &reg, 4 * sizeof *out); }
  static IntReg BroadcastPair(int32_t pair) { return pair - IntReg{}; }
  static IntReg WidenPairs(const Int8Pair* pairs) {
    using Entries = Lanes<int8_t, 2 * kLanes>;
    using Halves = Lanes<int16_t, 2 * kLanes>;
    return reinterpret_cast<IntReg>(__builtin_convertvector(LoadLanes<Entries>(pairs), Halves));
  }
  static IntReg MultiplyPairs(IntReg a, IntReg b) {
    return LowHalves(a) * LowHalves(b) + HighHalves(a) * HighHalves(b);
  }
  static IntReg MultiplyAddPairs(IntReg a, IntReg b, IntReg c) { return MultiplyPairs(a, b) + c; }
  static Reg ToFloats(IntReg reg) { return __builtin_convertvector(reg, Reg); }
  static IntReg LowHalves(IntReg reg) {
    return HighHalves(reinterpret_cast<IntReg>(reinterpret_cast<UnsignedReg>(reg) << 16));
  }
  static IntReg HighHalves(IntReg reg) { return reg >> 16; }
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
