// find_cells with AVX2 and FMA; the AVX-512 kernels use it too. A vector holds four pairs of a row.
#ifndef LMKAN_KERNELS_CPU_FIND_CELLS_AVX2_H_
#define LMKAN_KERNELS_CPU_FIND_CELLS_AVX2_H_

#include <immintrin.h>

#include <type_traits>

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

// Of eight features.
struct CellsAndPositions {
  __m256i cell;
  __m256 position;
};

// The cells of an axis in memory. Loads of whole cells cost less than gathers.
class CellsInMemory {
 public:
  explicit CellsInMemory(const Grid& grid)
      : cells_(grid.cells),
        num_grids_(_mm256_set1_ps(static_cast<float>(grid.num_grids))),
        last_cell_(_mm256_set1_epi32(grid.num_grids - 1)) {}

  // Cells of eight features, by the distribution function that the grid divides evenly.
  __m256i Locate(__m256 x) const {
    const __m256 sign_bit = _mm256_set1_ps(-0.0f);
    const __m256 exponential = ExpNonPositive(_mm256_or_ps(x, sign_bit));
    const __m256 tail = _mm256_mul_ps(_mm256_set1_ps(0.5f), exponential);
    const __m256 positive = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ);
    const __m256 level =
        _mm256_blendv_ps(tail, _mm256_sub_ps(_mm256_set1_ps(1.0f), tail), positive);
    // tail is finite and at least 0 even for NaN, so the conversion can't leave the range of int32.
    const __m256i cell = _mm256_cvttps_epi32(_mm256_mul_ps(level, num_grids_));
    return _mm256_min_epi32(cell, last_cell_);
  }

  // Positions of eight features inside cells i.
  __m256 Position(__m256 x, const int32_t* i) const {
    const __m256 even = Join(LoadTwo(i[0], i[1]), LoadTwo(i[4], i[5]));
    const __m256 odd = Join(LoadTwo(i[2], i[3]), LoadTwo(i[6], i[7]));
    const __m256 point = _mm256_shuffle_ps(even, odd, _MM_SHUFFLE(2, 0, 2, 0));
    const __m256 inverse_width = _mm256_shuffle_ps(even, odd, _MM_SHUFFLE(3, 1, 3, 1));
    return _mm256_mul_ps(_mm256_sub_ps(x, point), inverse_width);
  }

 private:
  static __m256 Join(__m128 low, __m128 high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
  }
  __m128 LoadTwo(int32_t first, int32_t second) const {
    const __m128 low = _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(cells_ + first)));
    return _mm_loadh_pi(low, reinterpret_cast<const __m64*>(cells_ + second));
  }

  const GridCell* cells_;
  __m256 num_grids_;
  __m256i last_cell_;
};

// Up to eight cells in registers. Permutations cost less than loads, and comparisons with so few
// bounds less than an exponential.
template <int kBounds>
class FewCells {
  static_assert(kBounds < 8);

 public:
  explicit FewCells(const GridCell* cells) {
    alignas(32) float points[8] = {};
    alignas(32) float inverse_widths[8] = {};
    for (int i = 0; i <= kBounds; ++i) {
      points[i] = cells[i].point;
      inverse_widths[i] = cells[i].inverse_width;
      if (i > 0) bounds_[i - 1] = _mm256_set1_ps(cells[i].point);
    }
    points_ = _mm256_load_ps(points);
    inverse_widths_ = _mm256_load_ps(inverse_widths);
  }

  CellsAndPositions Find(__m256 x) const {
    __m256i cell = _mm256_setzero_si256();  // and that of NaN
    for (int i = 0; i < kBounds; ++i) {
      const __m256 beyond = _mm256_cmp_ps(x, bounds_[i], _CMP_GE_OQ);
      cell = _mm256_sub_epi32(cell, _mm256_castps_si256(beyond));
    }
    const __m256 distance = _mm256_sub_ps(x, _mm256_permutevar8x32_ps(points_, cell));
    return {cell, _mm256_mul_ps(distance, _mm256_permutevar8x32_ps(inverse_widths_, cell))};
  }

 private:
  __m256 bounds_[kBounds];
  __m256 points_;
  __m256 inverse_widths_;
};

// An axis of at most eight cells.
template <int kBounds>
class ShortAxis : public FewCells<kBounds> {
 public:
  explicit ShortAxis(const Grid& grid) : FewCells<kBounds>(grid.cells) {}
};

// An axis of at most 16 cells: the right half of it, which mirrors the left one. The cell around
// the middle, if there is one, belongs to both.
template <int kBounds>
class MirroredAxis {
 public:
  explicit MirroredAxis(const Grid& grid)
      : right_(grid.cells + grid.num_grids / 2),
        first_right_(_mm256_set1_epi32(grid.num_grids / 2)),
        first_left_(_mm256_set1_epi32((grid.num_grids - 1) / 2)) {}

  CellsAndPositions Find(__m256 x) const {
    const CellsAndPositions right = right_.Find(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x));
    const __m256i right_cell = _mm256_add_epi32(first_right_, right.cell);
    const __m256i left_cell = _mm256_sub_epi32(first_left_, right.cell);
    const __m256 left_position = _mm256_sub_ps(_mm256_set1_ps(1.0f), right.position);
    // A blend looks at the sign bit, here that of x.
    const __m256 cell =
        _mm256_blendv_ps(_mm256_castsi256_ps(right_cell), _mm256_castsi256_ps(left_cell), x);
    return {_mm256_castps_si256(cell), _mm256_blendv_ps(right.position, left_position, x)};
  }

 private:
  FewCells<kBounds> right_;
  __m256i first_right_;
  __m256i first_left_;
};

// Rows of one group that go together: their records are neighbours in memory, so that a tile fills
// whole cache lines.
inline constexpr int64_t kTileRows = 16;

struct Tile {
  alignas(32) float x[kTileRows][2 * kGroupPairs];
  alignas(32) int32_t cell[kTileRows][2 * kGroupPairs];
};

// Eight features are x1 and x2 of four pairs by turns; a record holds all x1 before all x2.
inline void WriteRecord(__m128i line, __m256i i, __m256 position, CellRecord* record) {
  const __m256i first_then_second = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  const __m256i axes = _mm256_permutevar8x32_epi32(i, first_then_second);
  const __m128i cell = _mm_add_epi32(_mm_mullo_epi32(_mm256_castsi256_si128(axes), line),
                                     _mm256_extracti128_si256(axes, 1));
  _mm_store_si128(reinterpret_cast<__m128i*>(record->cell), cell);
  _mm256_storeu_ps(record->position1, _mm256_permutevar8x32_ps(position, first_then_second));
}

// Step by step and not row by row, because a row's steps wait for one another: a processor sees
// only a few rows ahead, but many of one step's.
inline void FindTile(const CellsInMemory& cells, __m128i line, int64_t rows, Tile* tile,
                     CellRecord* records) {
  for (int64_t r = 0; r < rows; ++r) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(tile->cell[r]),
                       cells.Locate(_mm256_load_ps(tile->x[r])));
  }
  for (int64_t r = 0; r < rows; ++r) {
    WriteRecord(line, _mm256_load_si256(reinterpret_cast<const __m256i*>(tile->cell[r])),
                cells.Position(_mm256_load_ps(tile->x[r]), tile->cell[r]), records + r);
  }
}

template <class Axis>
void FindTile(const Axis& axis, __m128i line, int64_t rows, Tile* tile, CellRecord* records) {
  for (int64_t r = 0; r < rows; ++r) {
    const CellsAndPositions found = axis.Find(_mm256_load_ps(tile->x[r]));
    WriteRecord(line, found.cell, found.position, records + r);
  }
}

// Cells between (i1, i2) and (i1 + 1, i2).
inline __m128i LineOf(const Grid& grid) { return _mm_set1_epi32(grid.num_grids + 1); }

// Widens `features` features of each row; the rest of a tile's eight are 0.
template <class T>
inline void LoadTile(const T* x, int64_t stride, int64_t features, int64_t rows, Tile* tile) {
  constexpr int64_t kFeatures = 2 * kGroupPairs;
  for (int64_t r = 0; r < rows; ++r, x += stride) {
    // The next tile's row: rows are too far apart for the processor to foresee.
    _mm_prefetch(reinterpret_cast<const char*>(x) + kTileRows * stride * sizeof(T), _MM_HINT_T0);
    if (features >= kFeatures) {
      _mm256_store_ps(tile->x[r], LoadEight(x));
      continue;
    }
    for (int64_t i = 0; i < kFeatures; ++i) tile->x[r][i] = i < features ? ToFloat(x[i]) : 0.0f;
  }
}

// One row: its groups take the places of a tile's rows.
template <class T, class Cells>
void FindCellsOfRow(const FindCellsArgs& args) {
  constexpr int64_t kFeatures = 2 * kGroupPairs;
  const Cells cells(args.grid);
  const __m128i line = LineOf(args.grid);
  Tile tile;
  const T* x = static_cast<const T*>(args.x);
  const int64_t whole = args.num_features / kFeatures;
  for (int64_t first = 0; first < whole; first += kTileRows) {
    const int64_t groups = whole - first < kTileRows ? whole - first : kTileRows;
    LoadTile(x + first * kFeatures, kFeatures, kFeatures, groups, &tile);
    FindTile(cells, line, groups, &tile, args.records + first);
  }
  const int64_t left = args.num_features - whole * kFeatures;
  if (left == 0) return;
  LoadTile(x + whole * kFeatures, kFeatures, left, 1, &tile);
  FindTile(cells, line, 1, &tile, args.records + whole);
}

template <class T, class Cells>
void FindCellsOfRows(const FindCellsArgs& args) {
  constexpr int64_t kFeatures = 2 * kGroupPairs;
  const Cells cells(args.grid);
  const __m128i line = LineOf(args.grid);
  const int64_t groups = (args.num_features + kFeatures - 1) / kFeatures;
  Tile tile;
  for (int64_t first = 0; first < args.rows; first += kTileRows) {
    const int64_t rows = args.rows - first < kTileRows ? args.rows - first : kTileRows;
    const T* x = static_cast<const T*>(args.x) + first * args.num_features;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t features = args.num_features - g * kFeatures;
      LoadTile(x + g * kFeatures, args.num_features, features, rows, &tile);
      FindTile(cells, line, rows, &tile, args.records + g * args.rows + first);
    }
  }
}

template <class T, class Cells>
void FindCellsWith(const FindCellsArgs& args) {
  if (args.rows == 1) {
    FindCellsOfRow<T, Cells>(args);
  } else {
    FindCellsOfRows<T, Cells>(args);
  }
}

// Calls function with `bounds`, kLeast ... kMost, as a compile-time constant.
template <int kLeast, int kMost, class Function>
void WithBounds(int32_t bounds, const Function& function) {
  if constexpr (kLeast < kMost) {
    if (bounds > kLeast) return WithBounds<kLeast + 1, kMost>(bounds, function);
  }
  function(std::integral_constant<int, kLeast>());
}

// The way depends on the grid alone: next to a cell's edge the ways may find either of two cells,
// and a row's result must not depend on the rows beside it.
template <class T>
void FindCellsAvx2(const FindCellsArgs& args) {
  const int32_t num_grids = args.grid.num_grids;
  if (num_grids <= 8) {
    return WithBounds<2, 7>(num_grids - 1, [&args](auto bounds) {
      FindCellsWith<T, ShortAxis<decltype(bounds)::value>>(args);
    });
  }
  if (num_grids <= 16) {
    return WithBounds<4, 7>(num_grids - 1 - num_grids / 2, [&args](auto bounds) {
      FindCellsWith<T, MirroredAxis<decltype(bounds)::value>>(args);
    });
  }
  FindCellsWith<T, CellsInMemory>(args);
}

}  // namespace
}  // namespace lmkan::cpu

#endif  // LMKAN_KERNELS_CPU_FIND_CELLS_AVX2_H_
