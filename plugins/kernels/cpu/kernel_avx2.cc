// Kernels for processors with AVX2, FMA and F16C. This file alone is compiled for them.
#include "accumulate.h"
#include "find_cells_avx2.h"

namespace lmkan::cpu {
namespace {

struct Avx2Vector {
  static constexpr int kLanes = 8;
  using Reg = __m256;
  static Reg Zero() { return _mm256_setzero_ps(); }
  static Reg Broadcast(const float* value) { return _mm256_broadcast_ss(value); }
  template <class T>
  static Reg Load(const T* values) {
    return LoadEight(values);
  }
  static void Store(float* out, Reg reg) { _mm256_storeu_ps(out, reg); }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace

const KernelSet kAvx2Kernels = {
    "avx2",
    Avx2Vector::kLanes,
    {FindCellsAvx2<float>, FindCellsAvx2<Float16>, FindCellsAvx2<BFloat16>},
    {Accumulate<Avx2Vector, float>, Accumulate<Avx2Vector, Float16>,
     Accumulate<Avx2Vector, BFloat16>},
    {StoreRows<float>, StoreRows<Float16>, StoreRows<BFloat16>},
};

}  // namespace lmkan::cpu
