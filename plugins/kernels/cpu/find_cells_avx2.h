// find_cells with AVX2 and FMA; the AVX-512 kernels use it too. One vector holds four pairs of a
// row.
#ifndef LMKAN_KERNELS_CPU_FIND_CELLS_AVX2_H_
#define LMKAN_KERNELS_CPU_FIND_CELLS_AVX2_H_

#include <immintrin.h>

#include "float16.h"
#include "kernel.h"

namespace lmkan::cpu {
namespace {

inline __m256 LoadEight(const float* values) { return _mm256_loadu_ps(values); }

inline __m256 LoadEight(const Float16* values) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
}

inline __m256 LoadEight(const BFloat16* values) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87 and for NaN some finite number.
inline __m256 ExpNonPositive(__m256 x) {
  x = _mm256_max_ps(x, _mm256_set1_ps(-87.0f));  // max takes its second operand for NaN
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // ln 2 in two parts, the first with trailing zeros, so that n * first is exact.
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  // Taylor to degree 6: the remainder at |r| = ln(2)/2 is 1.2e-7.
  __m256 p = _mm256_set1_ps(1.0f / 720.0f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
}

// Constants of a grid, in registers.
struct GridRegisters {
  explicit GridRegisters(const Grid& grid)
      : points(grid.points),
        inverse_widths(grid.inverse_widths),
        num_grids(_mm256_set1_ps(static_cast<float>(grid.num_grids))),
        last_cell(_mm256_set1_epi32(grid.num_grids - 1)),
        line(_mm_set1_epi32(grid.num_grids + 1)) {}

  const float* points;
  const float* inverse_widths;
  __m256 num_grids;
  __m256i last_cell;
  __m128i line;  // cells between (i1, i2) and (i1 + 1, i2)
};

// Cells and weights of four pairs from their eight features.
inline void FindFourCells(const GridRegisters& grid, __m256 x, CellRecord* record) {
  const __m256 sign_bit = _mm256_set1_ps(-0.0f);
  const __m256 tail =
      _mm256_mul_ps(_mm256_set1_ps(0.5f), ExpNonPositive(_mm256_or_ps(x, sign_bit)));
  const __m256 positive = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ);
  const __m256 level = _mm256_blendv_ps(tail, _mm256_sub_ps(_mm256_set1_ps(1.0f), tail), positive);
  // tail is finite and at least 0 even for NaN, so the conversion can't leave the range of int32.
  __m256i cell = _mm256_cvttps_epi32(_mm256_mul_ps(level, grid.num_grids));
  cell = _mm256_min_epi32(cell, grid.last_cell);
  const __m256 position = _mm256_mul_ps(_mm256_sub_ps(x, _mm256_i32gather_ps(grid.points, cell, 4)),
                                        _mm256_i32gather_ps(grid.inverse_widths, cell, 4));

  const __m256i first_then_second = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  const __m256i cells = _mm256_permutevar8x32_epi32(cell, first_then_second);
  const __m256 positions = _mm256_permutevar8x32_ps(position, first_then_second);
  const __m128 d1 = _mm256_castps256_ps128(positions);
  const __m128 d2 = _mm256_extractf128_ps(positions, 1);
  const __m128 one = _mm_set1_ps(1.0f);
  const __m128 e1 = _mm_sub_ps(one, d1);
  const __m128 e2 = _mm_sub_ps(one, d2);
  const __m128i index = _mm_add_epi32(_mm_mullo_epi32(_mm256_castsi256_si128(cells), grid.line),
                                      _mm256_extracti128_si256(cells, 1));
  _mm_store_si128(reinterpret_cast<__m128i*>(record->cell), index);
  _mm_store_ps(record->weight[0], _mm_mul_ps(e1, e2));
  _mm_store_ps(record->weight[1], _mm_mul_ps(e1, d2));
  _mm_store_ps(record->weight[2], _mm_mul_ps(d1, e2));
  _mm_store_ps(record->weight[3], _mm_mul_ps(d1, d2));
}

template <class T>
void FindCellsAvx2(const FindCellsArgs& args) {
  constexpr int kFeatures = 2 * kGroupPairs;
  const GridRegisters grid(args.grid);
  const T* x = static_cast<const T*>(args.x);
  const int64_t full = args.num_features / kFeatures;
  const int64_t rest = args.num_features % kFeatures;
  for (int64_t r = 0; r < args.rows; ++r, x += args.num_features) {
    for (int64_t g = 0; g < full; ++g) {
      FindFourCells(grid, LoadEight(x + g * kFeatures), &args.records[g * args.rows + r]);
    }
    if (rest != 0) {
      T padded[kFeatures] = {};
      for (int64_t i = 0; i < rest; ++i) padded[i] = x[full * kFeatures + i];
      FindFourCells(grid, LoadEight(padded), &args.records[full * args.rows + r]);
    }
  }
}

}  // namespace
}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_FIND_CELLS_AVX2_H_
