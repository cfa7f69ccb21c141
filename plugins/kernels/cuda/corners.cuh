// The arithmetic of one pair: weights of the four corners, and their product with 16 bytes of
// outputs of each corner.
//
// INT8: an entry is its integer times a scale. As on the CPU, weights are rounded to 1 / kWeightOne
// where both features lie within kFarthestFit cells of their cell's centre: one instruction then
// multiplies two corners of an output by two 16-bit weights. Within kFarthestCoarseFit cells they
// are rounded to kCoarseUnit / kWeightOne. Elsewhere they would not fit, and the sum is in float32,
// for which all other threads of the warp wait. Sums are kWeightOne times too large, which the
// store takes back.
#ifndef LMKAN_KERNELS_CUDA_CORNERS_CUH_
#define LMKAN_KERNELS_CUDA_CORNERS_CUH_

#include "cells.cuh"
#include "numbers.cuh"

namespace lmkan::cuda {

// Outputs in a chunk.
template <class T>
inline constexpr int kChunkOutputs = kChunkBytes / static_cast<int>(sizeof(T));

inline constexpr float kWeightOne = 16384.0f;
inline constexpr float kCoarseUnit = 8.0f;

// Positions within this distance of a cell's centre have weights below 2: 0.91 + 0.5 squared. And
// those that are below 16.
inline constexpr float kFarthestFit = 0.91f;
inline constexpr float kFarthestCoarseFit = 3.49f;

// What the sums must be multiplied with at the end.
template <class T>
inline constexpr float kSumUnit = 1.0f;
template <>
inline constexpr float kSumUnit<int8_t> = 1.0f / kWeightOne;

// Weights of the corners (i1, i2), (i1, i2 + 1), (i1 + 1, i2), (i1 + 1, i2 + 1).
template <class T>
struct Weights {
  float corner[4];

  __device__ explicit Weights(const Place& place) {
    const float low1 = 1.0f - place.position1;
    const float low2 = 1.0f - place.position2;
    corner[0] = low1 * low2;
    corner[1] = low1 * place.position2;
    corner[2] = place.position1 * low2;
    corner[3] = place.position1 * place.position2;
  }
};

template <>
struct Weights<int8_t> {
  float corner[4];  // times kWeightOne
  float unit;       // 1 or kCoarseUnit
  int32_t line[2];  // in units, those of corners 0 and 1, 2 and 3 in the low and high halves
  bool is_rounded;  // whether line is to be used

  __device__ explicit Weights(const Place& place) {
    const float high1 = place.position1 * kWeightOne;
    const float low1 = kWeightOne - high1;
    const float low2 = 1.0f - place.position2;
    corner[0] = low1 * low2;
    corner[1] = low1 * place.position2;
    corner[2] = high1 * low2;
    corner[3] = high1 * place.position2;
    const float distance1 = fabsf(place.position1 - 0.5f);
    const float distance2 = fabsf(place.position2 - 0.5f);
    // Both false for NaN.
    const bool is_fine = distance1 <= kFarthestFit && distance2 <= kFarthestFit;
    is_rounded = distance1 <= kFarthestCoarseFit && distance2 <= kFarthestCoarseFit;
    unit = is_fine ? 1.0f : kCoarseUnit;
    line[0] = line[1] = 0;
    if (is_rounded) {
      const float per_unit = is_fine ? 1.0f : 1.0f / kCoarseUnit;
      line[0] = Pair(__float2int_rn(corner[0] * per_unit), __float2int_rn(corner[1] * per_unit));
      line[1] = Pair(__float2int_rn(corner[2] * per_unit), __float2int_rn(corner[3] * per_unit));
    }
  }

  __device__ static int32_t Pair(int32_t low, int32_t high) {
    return static_cast<int32_t>(
        __byte_perm(static_cast<unsigned int>(low), static_cast<unsigned int>(high), 0x5410));
  }
};

__device__ inline void Unpack(uint32_t word, const float*, float (&values)[1]) {
  values[0] = __uint_as_float(word);
}

__device__ inline void Unpack(uint32_t word, const Float16*, float (&values)[2]) {
  const float2 pair = WidenFloat16(word);
  values[0] = pair.x;
  values[1] = pair.y;
}

__device__ inline void Unpack(uint32_t word, const BFloat16*, float (&values)[2]) {
  const float2 pair = WidenBFloat16(word);
  values[0] = pair.x;
  values[1] = pair.y;
}

// Adds weights * words, one word of each corner, to the word's sums.
template <class T, class Scales>
__device__ inline void AddWord(const uint32_t (&words)[4], const Weights<T>& weights, const Scales&,
                               int, float* sums) {
  constexpr int kOutputs = 4 / static_cast<int>(sizeof(T));
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    float values[kOutputs];
    Unpack(words[c], static_cast<const T*>(nullptr), values);
#pragma unroll
    for (int o = 0; o < kOutputs; ++o) sums[o] = fmaf(weights.corner[c], values[o], sums[o]);
  }
}

// scales(i) gives the scales of the four outputs of word i.
template <class Scales>
__device__ inline void AddWord(const uint32_t (&words)[4], const Weights<int8_t>& weights,
                               const Scales& scales, int word, float* sums) {
  float values[4];
  if (weights.is_rounded) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Outputs 2 * half and 2 * half + 1: their two corners of each line side by side.
      const unsigned int select = half == 0 ? 0x5140 : 0x7362;
      const int32_t line0 = static_cast<int32_t>(__byte_perm(words[0], words[1], select));
      const int32_t line1 = static_cast<int32_t>(__byte_perm(words[2], words[3], select));
      const int low = __dp2a_lo(weights.line[1], line1, __dp2a_lo(weights.line[0], line0, 0));
      const int high = __dp2a_hi(weights.line[1], line1, __dp2a_hi(weights.line[0], line0, 0));
      values[2 * half] = weights.unit * static_cast<float>(low);
      values[2 * half + 1] = weights.unit * static_cast<float>(high);
    }
  } else {
#pragma unroll
    for (int o = 0; o < 4; ++o) {
      values[o] = 0.0f;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const auto entry = static_cast<int8_t>(words[c] >> (8 * o));
        values[o] = fmaf(weights.corner[c], static_cast<float>(entry), values[o]);
      }
    }
  }
  const float4 scale = scales(word);
  sums[0] = fmaf(values[0], scale.x, sums[0]);
  sums[1] = fmaf(values[1], scale.y, sums[1]);
  sums[2] = fmaf(values[2], scale.z, sums[2]);
  sums[3] = fmaf(values[3], scale.w, sums[3]);
}

// Adds weights * chunks, 16 bytes of each corner, to the chunk's sums.
template <class T, class Scales>
__device__ inline void AddChunk(const uint4 (&chunks)[4], const Weights<T>& weights,
                                const Scales& scales, float (&sums)[kChunkOutputs<T>]) {
  constexpr int kOutputs = kChunkOutputs<T> / 4;
  const uint32_t words0[4] = {chunks[0].x, chunks[1].x, chunks[2].x, chunks[3].x};
  const uint32_t words1[4] = {chunks[0].y, chunks[1].y, chunks[2].y, chunks[3].y};
  const uint32_t words2[4] = {chunks[0].z, chunks[1].z, chunks[2].z, chunks[3].z};
  const uint32_t words3[4] = {chunks[0].w, chunks[1].w, chunks[2].w, chunks[3].w};
  AddWord(words0, weights, scales, 0, sums);
  AddWord(words1, weights, scales, 1, sums + kOutputs);
  AddWord(words2, weights, scales, 2, sums + 2 * kOutputs);
  AddWord(words3, weights, scales, 3, sums + 3 * kOutputs);
}

}  // namespace lmkan::cuda

#endif  // LMKAN_KERNELS_CUDA_CORNERS_CUH_
