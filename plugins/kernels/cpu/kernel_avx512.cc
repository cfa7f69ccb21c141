// Kernels for processors with AVX-512 F, BW, DQ, VL and VNNI. This file alone is compiled for them.
#include "accumulate.h"
#include "avx2_bytes.h"
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
};

// Sixty-four outputs of an INT8 table; see accumulate_int8.h.
struct Avx512Bytes {
  static constexpr int kOutputs = 64;
  static constexpr int kLanes = 16;
  using Reg = __m512;
  using Bytes = __m512i;
  using Words = __m512i;
  using Ints = __m512i;
  static Reg Zero() { return _mm512_setzero_ps(); }
  static Reg Load(const float* values) { return _mm512_loadu_ps(values); }
  static void Store(float* out, Reg reg) { _mm512_storeu_ps(out, reg); }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static __m512i LoadBytes(const int8_t* bytes) { return _mm512_loadu_si512(bytes); }
  static __m512i LoadWords(const int16_t* words) { return _mm512_loadu_si512(words); }
  static __m512i ZeroWords() { return _mm512_setzero_si512(); }
  static __m512i ShiftLow(__m512i a) { return _mm512_unpacklo_epi8(ZeroWords(), a); }
  static __m512i ShiftHigh(__m512i a) { return _mm512_unpackhi_epi8(ZeroWords(), a); }
  static __m512i RepeatWord(int16_t word) { return _mm512_set1_epi16(word); }
  static __m512i RepeatAsWords(int32_t words) { return _mm512_set1_epi32(words); }
  static __m512i InterleaveBytesLow(__m512i a, __m512i b) { return _mm512_unpacklo_epi8(a, b); }
  static __m512i InterleaveBytesHigh(__m512i a, __m512i b) { return _mm512_unpackhi_epi8(a, b); }
  static __m512i InterleaveWordsLow(__m512i a, __m512i b) { return _mm512_unpacklo_epi16(a, b); }
  static __m512i InterleaveWordsHigh(__m512i a, __m512i b) { return _mm512_unpackhi_epi16(a, b); }
  static __m512i MultiplyHigh(__m512i a, __m512i b) { return _mm512_mulhrs_epi16(a, b); }
  static __m512i Add(__m512i a, __m512i b) { return _mm512_add_epi16(a, b); }
  static __m512i MultiplyWords(__m512i a, __m512i b) { return _mm512_madd_epi16(a, b); }
  static __m512i MultiplyAddWords(__m512i a, __m512i b, __m512i c) {
    return _mm512_dpwssd_epi32(c, a, b);
  }
  static Reg ToFloats(__m512i ints) { return _mm512_cvtepi32_ps(ints); }
  static __m512i WidenLow(__m512i a) { return _mm512_srai_epi16(_mm512_unpacklo_epi8(a, a), 8); }
  static __m512i WidenHigh(__m512i a) { return _mm512_srai_epi16(_mm512_unpackhi_epi8(a, a), 8); }
  static __m512i FirstOfTwo(__m512i a) { return _mm512_srai_epi32(_mm512_slli_epi32(a, 16), 16); }
  static __m512i SecondOfTwo(__m512i a) { return _mm512_srai_epi32(a, 16); }
  static Reg Broadcast(float value) { return _mm512_set1_ps(value); }
  static Reg Multiply(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
};

// Vectors of 16 for the widest blocks, those of small tables. Elsewhere vectors of 8 are faster:
// blocks of 16 outputs leave too few vectors of 16, and widening 16 halves at once is slow.
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

void AccumulateInt8OfWidth(const AccumulateArgs& args) {
  if (args.width == Avx512Bytes::kOutputs) return AccumulateInt8<Avx512Bytes>(args);
  AccumulateInt8Avx2(args);
}

void AccumulateInt8RowOfWidth(const AccumulateRowArgs& args) {
  if (args.width == Avx512Bytes::kOutputs) return AccumulateInt8Row<Avx512Bytes>(args);
  AccumulateInt8RowAvx2(args);
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
    Avx512Bytes::kOutputs,
    {FindCellsAvx2<float>, FindCellsAvx2<Float16>, FindCellsAvx2<BFloat16>},
    RoundPositionsAvx2,
    {AccumulateFloats, Accumulate<Avx2Vector, Float16>, Accumulate<Avx2Vector, BFloat16>,
     AccumulateInt8OfWidth},
    {AccumulateOneRowOfFloats, AccumulateOneRowOfHalves<Float16>,
     AccumulateOneRowOfHalves<BFloat16>, AccumulateInt8RowOfWidth},
    {128, 64, 64, 1},
    {StoreRows<Avx2Vector, float>, StoreRows<Avx2Vector, Float16>, StoreRows<Avx2Vector, BFloat16>},
};

}  // namespace lmkan::cpu
