// The vector types of accumulate_int8.h for AVX2 and FMA; the AVX-512 kernels use them too.
#ifndef LMKAN_KERNELS_CPU_AVX2_BYTES_H_
#define LMKAN_KERNELS_CPU_AVX2_BYTES_H_

#include <immintrin.h>

#include <cstdint>

#include "accumulate.h"
#include "kernel.h"

namespace lmkan::cpu {
namespace {

struct SseBytes {
  static constexpr int kOutputs = 16;
  static constexpr int kLanes = 4;
  using Reg = __m128;
  using Bytes = __m128i;
  using Words = __m128i;
  using Ints = __m128i;
  static Reg Zero() { return _mm_setzero_ps(); }
  static Reg Load(const float* values) { return _mm_loadu_ps(values); }
  static void Store(float* out, Reg reg) { _mm_storeu_ps(out, reg); }
  static __m128i LoadBytes(const int8_t* bytes) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  }
  static __m128i LoadWords(const int16_t* words) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
  }
  static __m128i ZeroWords() { return _mm_setzero_si128(); }
  static __m128i ShiftLow(__m128i a) { return _mm_unpacklo_epi8(ZeroWords(), a); }
  static __m128i ShiftHigh(__m128i a) { return _mm_unpackhi_epi8(ZeroWords(), a); }
  static __m128i RepeatWord(int16_t word) { return _mm_set1_epi16(word); }
  static __m128i RepeatAsWords(int32_t words) { return _mm_set1_epi32(words); }
  static __m128i InterleaveBytesLow(__m128i a, __m128i b) { return _mm_unpacklo_epi8(a, b); }
  static __m128i InterleaveBytesHigh(__m128i a, __m128i b) { return _mm_unpackhi_epi8(a, b); }
  static __m128i InterleaveWordsLow(__m128i a, __m128i b) { return _mm_unpacklo_epi16(a, b); }
  static __m128i InterleaveWordsHigh(__m128i a, __m128i b) { return _mm_unpackhi_epi16(a, b); }
  static __m128i MultiplyHigh(__m128i a, __m128i b) { return _mm_mulhrs_epi16(a, b); }
  static __m128i Add(__m128i a, __m128i b) { return _mm_add_epi16(a, b); }
  static __m128i MultiplyWords(__m128i a, __m128i b) { return _mm_madd_epi16(a, b); }
  static __m128i MultiplyAddWords(__m128i a, __m128i b, __m128i c) {
    return _mm_add_epi32(_mm_madd_epi16(a, b), c);
  }
  static Reg ToFloats(__m128i ints) { return _mm_cvtepi32_ps(ints); }
  static __m128i WidenLow(__m128i a) { return _mm_srai_epi16(_mm_unpacklo_epi8(a, a), 8); }
  static __m128i WidenHigh(__m128i a) { return _mm_srai_epi16(_mm_unpackhi_epi8(a, a), 8); }
  static __m128i FirstOfTwo(__m128i a) { return _mm_srai_epi32(_mm_slli_epi32(a, 16), 16); }
  static __m128i SecondOfTwo(__m128i a) { return _mm_srai_epi32(a, 16); }
  static Reg Broadcast(float value) { return _mm_set1_ps(value); }
  static Reg Multiply(Reg a, Reg b) { return _mm_mul_ps(a, b); }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return _mm_fmadd_ps(a, b, c); }
};

struct HalfSseBytes : SseBytes {
  static constexpr int kOutputs = 8;
  static __m128i LoadBytes(const int8_t* bytes) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
  }
};

struct Avx2Bytes {
  static constexpr int kOutputs = 32;
  static constexpr int kLanes = 8;
  using Reg = __m256;
  using Bytes = __m256i;
  using Words = __m256i;
  using Ints = __m256i;
  static Reg Zero() { return _mm256_setzero_ps(); }
  static Reg Load(const float* values) { return _mm256_loadu_ps(values); }
  static void Store(float* out, Reg reg) { _mm256_storeu_ps(out, reg); }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static __m256i LoadBytes(const int8_t* bytes) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  }
  static __m256i LoadWords(const int16_t* words) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  }
  static __m256i ZeroWords() { return _mm256_setzero_si256(); }
  static __m256i ShiftLow(__m256i a) { return _mm256_unpacklo_epi8(ZeroWords(), a); }
  static __m256i ShiftHigh(__m256i a) { return _mm256_unpackhi_epi8(ZeroWords(), a); }
  static __m256i RepeatWord(int16_t word) { return _mm256_set1_epi16(word); }
  static __m256i RepeatAsWords(int32_t words) { return _mm256_set1_epi32(words); }
  static __m256i InterleaveBytesLow(__m256i a, __m256i b) { return _mm256_unpacklo_epi8(a, b); }
  static __m256i InterleaveBytesHigh(__m256i a, __m256i b) { return _mm256_unpackhi_epi8(a, b); }
  static __m256i InterleaveWordsLow(__m256i a, __m256i b) { return _mm256_unpacklo_epi16(a, b); }
  static __m256i InterleaveWordsHigh(__m256i a, __m256i b) { return _mm256_unpackhi_epi16(a, b); }
  static __m256i MultiplyHigh(__m256i a, __m256i b) { return _mm256_mulhrs_epi16(a, b); }
  static __m256i Add(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
  static __m256i MultiplyWords(__m256i a, __m256i b) { return _mm256_madd_epi16(a, b); }
  static __m256i MultiplyAddWords(__m256i a, __m256i b, __m256i c) {
    return _mm256_add_epi32(_mm256_madd_epi16(a, b), c);
  }
  static Reg ToFloats(__m256i ints) { return _mm256_cvtepi32_ps(ints); }
  static __m256i WidenLow(__m256i a) { return _mm256_srai_epi16(_mm256_unpacklo_epi8(a, a), 8); }
  static __m256i WidenHigh(__m256i a) { return _mm256_srai_epi16(_mm256_unpackhi_epi8(a, a), 8); }
  static __m256i FirstOfTwo(__m256i a) { return _mm256_srai_epi32(_mm256_slli_epi32(a, 16), 16); }
  static __m256i SecondOfTwo(__m256i a) { return _mm256_srai_epi32(a, 16); }
  static Reg Broadcast(float value) { return _mm256_set1_ps(value); }
  static Reg Multiply(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
};

inline void AccumulateInt8Avx2(const AccumulateArgs& args) {
  if (args.width == Avx2Bytes::kOutputs) return AccumulateInt8<Avx2Bytes>(args);
  if (args.width == SseBytes::kOutputs) return AccumulateInt8<SseBytes>(args);
  AccumulateInt8<HalfSseBytes>(args);
}

inline void AccumulateInt8RowAvx2(const AccumulateRowArgs& args) {
  if (args.width == Avx2Bytes::kOutputs) return AccumulateInt8Row<Avx2Bytes>(args);
  if (args.width == SseBytes::kOutputs) return AccumulateInt8Row<SseBytes>(args);
  AccumulateInt8Row<HalfSseBytes>(args);
}

// See RoundPositionsArgs.
inline int64_t RoundPositionsAvx2(const RoundPositionsArgs& args) {
  const __m256i one = _mm256_set1_epi32(kWeightOne);
  const __m128i four_ones = _mm256_castsi256_si128(one);
  const int lanes_in_use = (1 << args.num_pairs) - 1;
  int64_t num_far = 0;
  CellRecord* record = args.records;
  for (int64_t r = 0; r < args.rows; ++r, ++record) {
    const __m256 positions = _mm256_loadu_ps(record->position[0]);
    // A position that is too large, or NaN, becomes the least integer, which is the largest without
    // its sign.
    const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(positions, _mm256_cvtepi32_ps(one)));
    const __m256i fit = _mm256_cmpeq_epi32(_mm256_max_epu32(rounded, one), one);
    const __m128i both_fit =
        _mm_and_si128(_mm256_castsi256_si128(fit), _mm256_extracti128_si256(fit, 1));
    const __m128i first = _mm256_castsi256_si128(rounded);
    const __m128i second = _mm256_extracti128_si256(rounded, 1);
    const __m128i w11 = _mm_srli_epi32(
        _mm_add_epi32(_mm_mullo_epi32(first, second), _mm_set1_epi32(kWeightOne / 2)), 14);
    const __m128i w10 = _mm_sub_epi32(first, w11);
    const __m128i w01 = _mm_sub_epi32(second, w11);
    const __m128i w00 = _mm_sub_epi32(_mm_sub_epi32(four_ones, first), w01);
    const __m128i line0 =
        _mm_and_si128(_mm_blend_epi16(w00, _mm_slli_epi32(w01, 16), 0xaa), both_fit);
    const __m128i line1 =
        _mm_and_si128(_mm_blend_epi16(w10, _mm_slli_epi32(w11, 16), 0xaa), both_fit);
    const int far = ~_mm_movemask_ps(_mm_castsi128_ps(both_fit)) & lanes_in_use;
    for (int p = 0; far >> p != 0; ++p) {
      if ((far >> p & 1) == 0) continue;
      args.far_pairs[num_far++] =
          MakeFarPair(r, p, record->cell[p], record->position[0][p], record->position[1][p]);
    }
    auto* weights = reinterpret_cast<__m128i*>(record->weights);
    _mm_store_si128(weights, _mm_unpacklo_epi32(line0, line1));
    _mm_store_si128(weights + 1, _mm_unpackhi_epi32(line0, line1));
  }
  return num_far;
}

}  // namespace
}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_AVX2_BYTES_H_
