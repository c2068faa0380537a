// What the kernels of batch norm do to vectors: rows of an activation, bits of a mask, values rounded to their type.
#pragma once

#include <cstring>
#include <type_traits>

#include "lanes.h"

namespace resnet_fused::cpu::RESNET_FUSED_LANES {

inline Floats subtract(Floats a, Floats b) { return a - b; }
inline Floats multiply(Floats a, Floats b) { return a * b; }

// Which lanes a gradient passes.
#ifdef __AVX512F__
using Pass = __mmask16;
inline Pass above_zero(Floats v) { return _mm512_cmp_ps_mask(v, Floats{}, _CMP_NLE_UQ); }  // or a NaN
inline Pass equal(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline Pass wins(Floats v, Floats most) {
  return _mm512_cmp_ps_mask(v, most, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
}
inline Floats select(Pass pass, Floats v) { return _mm512_maskz_mov_ps(pass, v); }
inline Floats choose(Pass pass, Floats v, Floats other) { return _mm512_mask_mov_ps(other, pass, v); }
inline Ints choose(Pass pass, Ints v, Ints other) { return _mm512_mask_mov_epi32(other, pass, v); }
inline uint32_t bits_of(Pass pass) { return pass; }
inline Pass pass_of(uint32_t bits) { return static_cast<Pass>(bits); }
#else
using Pass = __m256i;
inline Pass above_zero(Floats v) { return _mm256_castps_si256(_mm256_cmp_ps(v, Floats{}, _CMP_NLE_UQ)); }  // or a NaN
inline Pass wins(Floats v, Floats most) {
  return _mm256_castps_si256(_mm256_or_ps(_mm256_cmp_ps(v, most, _CMP_GT_OQ), _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
inline Pass equal(Ints a, Ints b) { return _mm256_cmpeq_epi32(a, b); }
inline Floats select(Pass pass, Floats v) { return _mm256_and_ps(_mm256_castsi256_ps(pass), v); }
inline Floats choose(Pass pass, Floats v, Floats other) {
  return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(pass));
}
inline Ints choose(Pass pass, Ints v, Ints other) { return _mm256_blendv_epi8(other, v, pass); }
inline uint32_t bits_of(Pass pass) { return _mm256_movemask_ps(_mm256_castsi256_ps(pass)); }
inline Pass pass_of(uint32_t bits) {
  const Ints bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(set1(static_cast<int32_t>(bits)), bit), bit);
}
#endif

// The bits of a vector of values, of which the first is a multiple of 8.
inline Pass load_pass(const uint8_t* bits, All) {
  std::conditional_t<kLanes == 16, uint16_t, uint8_t> found;
  std::memcpy(&found, bits, sizeof(found));
  return pass_of(found);
}
inline void store_pass(uint8_t* bits, Pass pass, All) {
  const auto found = static_cast<std::conditional_t<kLanes == 16, uint16_t, uint8_t>>(bits_of(pass));
  std::memcpy(bits, &found, sizeof(found));
}

// The last lanes of all.
struct Last : Some {
  explicit Last(int64_t left) : Some(left), left(left) {}
  int64_t left;
};
inline Pass load_pass(const uint8_t* bits, Last last) {
  return pass_of(bits[0] | (last.left > 8 ? uint32_t{bits[1]} << 8 : 0));
}
inline void store_pass(uint8_t* bits, Pass pass, Last last) {
  const uint32_t found = bits_of(pass) & ((1u << last.left) - 1);
  bits[0] = static_cast<uint8_t>(found);
  if (last.left > 8) bits[1] = static_cast<uint8_t>(found >> 8);
}

// Rounded to T, of which the smallest numbers stay: AVX-512's own conversion to bfloat16 makes them zero.
template <class Which>
inline void write(float* p, Floats v, Which which) {
  store(p, v, which);
}
#ifdef __AVX512F__
inline Ints nearest(Floats v) {
  const Ints bits = _mm512_castps_si512(v), odd = _mm512_and_si512(shift_right(bits, 16), set1(1));
  const Ints rounded = add(add(bits, odd), set1(0x7fff)), quiet = _mm512_or_si512(bits, set1(0x400000));
  return shift_right(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet), 16);
}
inline void write(BFloat16* p, Floats v, All) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(nearest(v)));
}
inline void write(BFloat16* p, Floats v, Some which) {
  _mm256_mask_storeu_epi16(p, which.mask, _mm512_cvtepi32_epi16(nearest(v)));
}
#else
template <class Which>
inline void write(BFloat16* p, Floats v, Which which) {
  store(p, v, which);
}
#endif

// As T holds it.
template <class T>
inline Floats rounded(Floats v) {
  if constexpr (std::is_same_v<T, float>) return v;
#ifdef __AVX512F__
  return _mm512_castsi512_ps(shift_left(nearest(v), 16));
#else
  T values[kLanes];
  store(values, v);
  return load(values);
#endif
}

inline Floats relu_of(Floats v) { return max(Floats{}, v); }  // a NaN stays

// body(number of rows, index of the first, place in it, which lanes), for rows one by one
template <class Body>
[[gnu::always_inline]] inline void for_rows(int64_t width, int64_t begin, int64_t end, Body body) {
  constexpr std::integral_constant<int, 1> one;
  for (int64_t at = begin; at < end; at += width) {
    const int64_t length = std::min(width, end - at);
    int64_t j = 0;
    for (; j + kLanes <= length; j += kLanes) body(one, at + j, j, All{});
    if (j < length) body(one, at + j, j, Last(length - j));
  }
}

// The same for up to four rows at once.
template <class Body>
[[gnu::always_inline]] inline void for_several_rows(int64_t width, int64_t begin, int64_t end, Body body) {
  constexpr int64_t kNarrow = 128;
  constexpr std::integral_constant<int, 4> four;
  int64_t at = begin;
  if (width <= kNarrow)
    for (; at + four * width <= end; at += four * width)
      for (int64_t j = 0; j < width; j += kLanes) body(four, at + j, j, All{});
  for_rows(width, at, end, body);
}

// Lanes that are no values count as zero.
inline Floats inside(Floats v, All) { return v; }
#ifdef __AVX512F__
inline Floats inside(Floats v, Last last) { return select(last.mask, v); }
#else
inline Floats inside(Floats v, Last last) { return select(pass_of((1u << last.count) - 1), v); }
#endif

template <int kRows>
[[gnu::always_inline]] inline Floats sum_of(const Floats (&v)[kRows]) {
  if constexpr (kRows == 4) return add(add(v[0], v[1]), add(v[2], v[3]));
  return v[0];
}

// body(channel, which lanes), over the channels of a pixel
template <class Body>
[[gnu::always_inline]] inline void for_channels(int64_t channels, Body body) {
  int64_t j = 0;
  for (; j + kLanes <= channels; j += kLanes) body(j, All{});
  if (j < channels) body(j, Last(channels - j));
}

}  // namespace resnet_fused::cpu::RESNET_FUSED_LANES
