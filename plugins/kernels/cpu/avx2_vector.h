// The vector type of accumulate.h for AVX2, FMA and F16C; the AVX-512 kernels use it too.
#ifndef LMKAN_KERNELS_CPU_AVX2_VECTOR_H_
#define LMKAN_KERNELS_CPU_AVX2_VECTOR_H_

#include <immintrin.h>

#include <cstddef>

#include "find_cells_avx2.h"
#include "float16.h"

namespace lmkan::cpu {
namespace {

struct Avx2Vector {
  static constexpr int kLanes = 8;
  using Reg = __m256;
  static Reg Zero() { return _mm256_setzero_ps(); }
  static Reg One() { return Broadcast(1.0f); }
  static Reg Broadcast(float value) { return _mm256_set1_ps(value); }
  template <class T>
  static Reg Load(const T* values) {
    return LoadEight(values);
  }
  static Reg LoadFour(const float* values) {
    return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(values));
  }
  static void Store(float* out, Reg reg) { _mm256_storeu_ps(out, reg); }
  static void Store(Float16* out, Reg reg) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm256_cvtps_ph(reg, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void Store(BFloat16* out, Reg reg) {
    const __m256i bits = _mm256_castps_si256(reg);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(reg, reg, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(out),
        _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
  }
  template <int kLane>
  static Reg Repeat(Reg reg) {
    return _mm256_permute_ps(reg, kLane * 0x55);
  }
  static Reg Subtract(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg Multiply(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }

  using IntReg = __m256i;
  static bool PositionsFit(const CellRecord& record, int64_t pairs, float farthest) {
    static_assert(offsetof(CellRecord, position2) ==
                  offsetof(CellRecord, position1) + 4 * sizeof(float));
    const Reg from_centre = _mm256_sub_ps(_mm256_loadu_ps(record.position1), Broadcast(0.5f));
    const Reg distance = _mm256_andnot_ps(Broadcast(-0.0f), from_centre);
    // "Not at most", which NaN fulfils.
    const Reg beyond = _mm256_cmp_ps(distance, Broadcast(farthest), _CMP_NLE_UQ);
    const int lanes_in_use = ((1 << pairs) - 1) * 0x11;
    return (_mm256_movemask_ps(beyond) & lanes_in_use) == 0;
  }
  static IntReg RoundPair(Reg a, Reg b) {
    return _mm256_blend_epi16(_mm256_cvtps_epi32(a), _mm256_slli_epi32(_mm256_cvtps_epi32(b), 16),
                              0xaa);
  }
  static void StoreFour(int32_t* out, IntReg reg) {
    _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(reg));
  }
  static IntReg BroadcastPair(int32_t pair) { return _mm256_set1_epi32(pair); }
  static IntReg WidenPairs(const Int8Pair* pairs) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pairs)));
  }
  static IntReg LoadEntries(const Int8Entry* entries) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries));
  }
  static IntReg InterleaveWordsLow(const Int8Entry* a, const Int8Entry* b) {
    return _mm256_unpacklo_epi16(LoadEntries(a), LoadEntries(b));
  }
  static IntReg InterleaveWordsHigh(const Int8Entry* a, const Int8Entry* b) {
    return _mm256_unpackhi_epi16(LoadEntries(a), LoadEntries(b));
  }
  static IntReg LowerBytes(IntReg reg) { return _mm256_slli_epi16(reg, 8); }
  static IntReg UpperBytes(IntReg reg) { return _mm256_and_si256(reg, _mm256_set1_epi16(-256)); }
  static IntReg DivideHalves(IntReg reg) {
    static_assert(kHalvesDivisor == 8);
    return _mm256_srai_epi16(reg, 3);
  }
  static IntReg MultiplyPairs(IntReg a, IntReg b) { return _mm256_madd_epi16(a, b); }
  static IntReg MultiplyAddPairs(IntReg a, IntReg b, IntReg c) {
    return _mm256_add_epi32(MultiplyPairs(a, b), c);
  }
  static Reg ToFloats(IntReg reg) { return _mm256_cvtepi32_ps(reg); }
  static IntReg LowHalves(IntReg reg) { return _mm256_srai_epi32(_mm256_slli_epi32(reg, 16), 16); }
  static IntReg HighHalves(IntReg reg) { return _mm256_srai_epi32(reg, 16); }
};

}  // namespace
}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_AVX2_VECTOR_H_
