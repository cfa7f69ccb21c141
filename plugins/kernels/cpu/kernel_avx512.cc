// Kernels for processors with AVX-512 F, BW, DQ and VL. This file alone is compiled for them.
#include "accumulate.h"
#include "find_cells_avx2.h"

namespace lmkan::cpu {
namespace {

struct Avx512Vector {
  static constexpr int kLanes = 16;
  using Reg = __m512;
  static Reg Zero() { return _mm512_setzero_ps(); }
  static Reg Broadcast(const float* value) { return _mm512_set1_ps(*value); }
  static Reg Load(const float* values) { return _mm512_loadu_ps(values); }
  static Reg Load(const Float16* values) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  }
  static Reg Load(const BFloat16* values) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void Store(float* out, Reg reg) { _mm512_storeu_ps(out, reg); }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

const KernelSet kAvx512Kernels = {
    "avx512",
    Avx512Vector::kLanes,
    {FindCellsAvx2<float>, FindCellsAvx2<Float16>, FindCellsAvx2<BFloat16>},
    {Accumulate<Avx512Vector, float>, Accumulate<Avx512Vector, Float16>,
     Accumulate<Avx512Vector, BFloat16>},
    {StoreRows<float>, StoreRows<Float16>, StoreRows<BFloat16>},
};

}  // namespace lmkan::cpu
