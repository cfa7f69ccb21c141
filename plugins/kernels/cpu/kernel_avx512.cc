// Kernels for processors with AVX-512 F, BW, DQ, VL and VNNI. This file alone is compiled for them.
#include "accumulate.h"
#include "avx2_vector.h"
#include "find_cells_avx2.h"

namespace lmkan::cpu {
namespace {

struct Avx512Vector {
  static constexpr int kLanes = 16;
  using Reg = __m512;
  static Reg Zero() { return _mm512_setzero_ps(); }
  static Reg One() { return _mm512_set1_ps(1.0f); }
  static Reg Load(const float* values) { return _mm512_loadu_ps(values); }
  static Reg LoadFour(const float* values) { return _mm512_broadcast_f32x4(_mm_load_ps(values)); }
  static void Store(float* out, Reg reg) { _mm512_storeu_ps(out, reg); }
  template <int kLane>
  static Reg Repeat(Reg reg) {
    return _mm512_permute_ps(reg, kLane * 0x55);
  }
  static Reg Subtract(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg Multiply(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }

  static Reg Broadcast(float value) { return _mm512_set1_ps(value); }
  using IntReg = __m512i;
  static IntReg BroadcastPair(int32_t pair) { return _mm512_set1_epi32(pair); }
  static IntReg WidenPairs(const Int8Pair* pairs) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs)));
  }
  static IntReg InterleaveWordsLow(const Int8Entry* a, const Int8Entry* b) {
    return _mm512_unpacklo_epi16(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
  }
  static IntReg InterleaveWordsHigh(const Int8Entry* a, const Int8Entry* b) {
    return _mm512_unpackhi_epi16(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
  }
  static IntReg LowerBytes(IntReg reg) { return _mm512_slli_epi16(reg, 8); }
  static IntReg UpperBytes(IntReg reg) { return _mm512_and_si512(reg, _mm512_set1_epi16(-256)); }
  static IntReg DivideHalves(IntReg reg) {
    static_assert(kHalvesDivisor == 8);
    return _mm512_srai_epi16(reg, 3);
  }
  static IntReg MultiplyPairs(IntReg a, IntReg b) { return _mm512_madd_epi16(a, b); }
  static IntReg MultiplyAddPairs(IntReg a, IntReg b, IntReg c) {
    return _mm512_dpwssd_epi32(c, a, b);
  }
  static Reg ToFloats(IntReg reg) { return _mm512_cvtepi32_ps(reg); }
  static IntReg LowHalves(IntReg reg) { return _mm512_srai_epi32(_mm512_slli_epi32(reg, 16), 16); }
  static IntReg HighHalves(IntReg reg) { return _mm512_srai_epi32(reg, 16); }
};

// Vectors of 8 for INT8 tables, with the instruction that multiplies and adds at once.
struct VnniVector : Avx2Vector {
  static IntReg MultiplyAddPairs(IntReg a, IntReg b, IntReg c) {
    return _mm256_dpwssd_epi32(c, a, b);
  }
};

// Vectors of 16 for the widest blocks: those of small tables, and of INT8. Elsewhere vectors of 8
// are faster: blocks of 16 outputs leave too few vectors of 16, and widening 16 halves at once is
// slow.
void AccumulateFloats(const AccumulateArgs& args) {
  if (args.width == kMaxBlockOutputs) return Accumulate<Avx512Vector, float>(args);
  Accumulate<Avx2Vector, float>(args);
}

// Blocks of one row side by side, though, fill vectors of 16.
void AccumulateOneRowOfFloats(const AccumulateRowArgs& args) {
  if (args.width == Avx512Vector::kLanes && args.num_blocks > 1) {
    return AccumulateOneRowOfBlocks<Avx512Vector, float, 1, 8>(args);
  }
  if (args.width == kMaxBlockOutputs) {
    return AccumulateOneRowOfBlocks<Avx512Vector, float, 2, 4>(args);
  }
  AccumulateOneRow<Avx2Vector, float>(args);
}

void AccumulateInt8(const AccumulateArgs& args) {
  if (args.width == kMaxBlockOutputs) return Accumulate<Avx512Vector, Int8Pair>(args);
  Accumulate<VnniVector, Int8Pair>(args);
}

void AccumulateOneRowOfInt8(const AccumulateRowArgs& args) {
  if (args.width == kMaxBlockOutputs) return AccumulateOneRow<Avx512Vector, Int8Pair>(args);
  AccumulateOneRow<VnniVector, Int8Pair>(args);
}

template <class T>
void AccumulateOneRowOfHalves(const AccumulateRowArgs& args) {
  if (args.width == kMaxBlockOutputs) {
    return AccumulateOneRowOfBlocks<Avx2Vector, T, 4, 2>(args);
  }
  AccumulateOneRow<Avx2Vector, T>(args);
}

}  // namespace

const KernelSet kAvx512Kernels = {
    "avx512",
    Avx2Vector::kLanes,
    {FindCellsAvx2<float>, FindCellsAvx2<Float16>, FindCellsAvx2<BFloat16>},
    RoundWeights<Avx2Vector>,
    {AccumulateFloats, Accumulate<Avx2Vector, Float16>, Accumulate<Avx2Vector, BFloat16>,
     AccumulateInt8, AccumulateCompact<Avx512Vector>},
    {AccumulateOneRowOfFloats, AccumulateOneRowOfHalves<Float16>,
     AccumulateOneRowOfHalves<BFloat16>, AccumulateOneRowOfInt8,
     AccumulateOneRowOfCompact<Avx512Vector>},
    {128, 64, 64, 1, 1},
    0,
    {StoreRows<Avx2Vector, float>, StoreRows<Avx2Vector, Float16>, StoreRows<Avx2Vector, BFloat16>},
};

}  // namespace lmkan::cpu
