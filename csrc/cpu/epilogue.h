// The epilogue, act(scale * sum + bias + residual), of sixteen channels at a time, for the element types of y.
#pragma once

#include <immintrin.h>

#include "panels.h"

namespace resnet_fused::cpu {

struct BFloat16 {
  uint16_t bits;
};

// The values of all sixteen channels, or of those that `which` has a bit for.
struct All {};

inline __m512 load(const float* p, All = {}) { return _mm512_loadu_ps(p); }
inline __m512 load(const float* p, __mmask16 which) { return _mm512_maskz_loadu_ps(which, p); }
inline void store(float* p, __m512 v, int32_t, All = {}) { _mm512_storeu_ps(p, v); }
inline void store(float* p, __m512 v, int32_t, __mmask16 which) { _mm512_mask_storeu_ps(p, which, v); }

inline __m256i load_bits(const BFloat16* p, All) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i load_bits(const BFloat16* p, __mmask16 which) { return _mm256_maskz_loadu_epi16(which, p); }
inline void store_bits(BFloat16* p, __m256i v, All) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline void store_bits(BFloat16* p, __m256i v, __mmask16 which) { _mm256_mask_storeu_epi16(p, which, v); }

template <class Which = All>
inline __m512 load(const BFloat16* p, Which which = {}) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bits(p, which)), 16));
}
template <class Which = All>
inline void store(BFloat16* p, __m512 v, int32_t, Which which = {}) {
  store_bits(p, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)), which);
}

inline __m128i load_bits(const uint8_t* p, All) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m128i load_bits(const uint8_t* p, __mmask16 which) { return _mm_maskz_loadu_epi8(which, p); }
inline void store_bits(uint8_t* p, __m128i v, All) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }
inline void store_bits(uint8_t* p, __m128i v, __mmask16 which) { _mm_mask_storeu_epi8(p, which, v); }

// 8 bits as they are: finish folds the grids into scale and bias.
template <class Which = All>
inline __m512 load(const uint8_t* p, Which which = {}) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_bits(p, which)));
}
template <class Which = All>
inline void store(uint8_t* p, __m512 v, int32_t least, Which which = {}) {
  const __m512i q = _mm512_max_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(least));
  store_bits(p, _mm512_cvtusepi32_epi8(q), which);
}

inline __m512 as_float(__m512 sum) { return sum; }
inline __m512 as_float(__m512i sum) { return _mm512_cvtepi32_ps(sum); }

// What the epilogue of a tile will read and write, asked for pixel by pixel while the sums are formed.
template <class Out>
class Results {
 public:
  Results(const Tile& tile, int length) : step_(tile.conv.k * sizeof(Out)), left_(length) {
    const Conv& c = tile.conv;
    const int64_t column = tile.block * kColumns * static_cast<int64_t>(sizeof(Out));
    y_ = static_cast<char*>(c.y) + tile.runs[0].pixel * step_ + column;
    if (c.residual) residual_ = static_cast<const char*>(c.residual) + tile.runs[0].pixel * step_ + column;
    jump_ = (tile.runs[1].pixel - tile.runs[0].pixel - length) * step_;
  }

  void fetch() {
    for (size_t line = 0; line < kColumns * sizeof(Out); line += 64) {
      __builtin_prefetch(y_ + line, 1, 3);
      if (residual_) __builtin_prefetch(residual_ + line, 0, 3);
    }
    const int64_t step = --left_ == 0 ? step_ + jump_ : step_;
    y_ += step;
    if (residual_) residual_ += step;
  }

 private:
  int64_t step_, jump_, left_;  // to the next pixel, more at the end of a run, pixels until then
  char* y_;
  const char* residual_ = nullptr;
};

template <class Out, class Last, int kPixels, int kVectors, class Sum>
[[gnu::always_inline]] inline void finish(const Conv& c, int64_t pixel, int64_t column, Sum (&sums)[kPixels][kVectors],
                                          Last last) {
  constexpr bool kEight = sizeof(Out) == 1;
  const int64_t at = pixel * c.k + column;
  // On y's grid: steps of y_grid.scale from its zero point.
  const float step = kEight ? 1 / c.y_grid.scale : 1, zero = kEight ? static_cast<float>(c.y_grid.zero_point) : 0;
  const float residual_step = kEight ? c.residual_grid.scale * step : 1;
  const float shift = kEight && c.residual ? zero - residual_step * static_cast<float>(c.residual_grid.zero_point) : zero;
  __m512 v[kPixels][kVectors];
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; j++) {
    __m512 bias = _mm512_loadu_ps(c.bias + column + 16 * j);
    __m512 scale = c.scale ? _mm512_loadu_ps(c.scale + column + 16 * j) : _mm512_set1_ps(1);
    if constexpr (kEight) {
      bias = _mm512_fmadd_ps(bias, _mm512_set1_ps(step), _mm512_set1_ps(shift));
      scale = _mm512_mul_ps(scale, _mm512_set1_ps(step));
    }
#pragma GCC unroll 7
    for (int i = 0; i < kPixels; i++) v[i][j] = _mm512_fmadd_ps(as_float(sums[i][j]), scale, bias);
  }
  if (c.residual) {
    const Out* residual = static_cast<const Out*>(c.residual) + at;
#pragma GCC unroll 7
    for (int i = 0; i < kPixels; i++)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; j++) {
        const Out* from = residual + i * c.k + 16 * j;
        const __m512 added = j + 1 == kVectors ? load(from, last) : load(from, All{});
        v[i][j] = kEight ? _mm512_fmadd_ps(added, _mm512_set1_ps(residual_step), v[i][j]) : _mm512_add_ps(v[i][j], added);
      }
  }
  if (c.relu && !kEight) {
#pragma GCC unroll 7
    for (int i = 0; i < kPixels; i++)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; j++) v[i][j] = _mm512_max_ps(__m512{}, v[i][j]);  // in this order a NaN stays
  }
  const int32_t least = c.relu ? c.y_grid.zero_point : 0;
  Out* y = static_cast<Out*>(c.y) + at;
#pragma GCC unroll 7
  for (int i = 0; i < kPixels; i++)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; j++) {
      Out* to = y + i * c.k + 16 * j;
      j + 1 == kVectors ? store(to, v[i][j], least, last) : store(to, v[i][j], least, All{});
    }
}

template <class Out, int kPixels, int kVectors, class Sum>
[[gnu::noinline]] void finish_some(const Conv& c, int64_t pixel, int64_t column, Sum (&sums)[kPixels][kVectors]) {
  const int64_t left = c.k - column - 16 * (kVectors - 1);
  finish<Out>(c, pixel, column, sums, static_cast<__mmask16>((1u << left) - 1));
}

// Sums of kPixels pixels from `pixel` on, by kVectors times 16 columns from `column` on, of which the last 16 may be
// less.
template <class Out, int kPixels, int kVectors, class Sum>
[[gnu::always_inline]] inline void finish(const Conv& c, int64_t pixel, int64_t column, Sum (&sums)[kPixels][kVectors]) {
  if (column + 16 * kVectors <= c.k) {
    finish<Out>(c, pixel, column, sums, All{});
  } else {
    Sum copy[kPixels][kVectors];  // so that the sums themselves may stay in registers
    std::memcpy(copy, sums, sizeof(copy));
    finish_some<Out>(c, pixel, column, copy);
  }
}

}  // namespace resnet_fused::cpu
