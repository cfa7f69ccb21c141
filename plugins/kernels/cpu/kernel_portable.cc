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
  static Reg One() { return {{1.0f, 1.0f, 1.0f, 1.0f}}; }
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
  static Reg Add(Reg a, Reg b) {
    for (int i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
    return a;
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
    false,
    {FindCells<float>, FindCells<Float16>, FindCells<BFloat16>},
    {Accumulate<PortableVector, float>, Accumulate<PortableVector, Float16>,
     Accumulate<PortableVector, BFloat16>},
    {AccumulateOneRow<PortableVector, float>, AccumulateOneRow<PortableVector, Float16>,
     AccumulateOneRow<PortableVector, BFloat16>},
    {StoreRows<PortableVector, float>, StoreRows<PortableVector, Float16>,
     StoreRows<PortableVector, BFloat16>},
};

}  // namespace lmkan::cpu
