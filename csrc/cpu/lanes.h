// Vectors of the instruction set that a file is compiled for: 16 lanes of 32 bits with AVX-512, 8 with AVX2.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

// What is compiled for it is in its namespace: of functions of one name the linker keeps one.
#ifdef __AVX512F__
#define RESNET_FUSED_LANES avx512
#else
#define RESNET_FUSED_LANES avx2
#endif

namespace resnet_fused::cpu::RESNET_FUSED_LANES {

struct BFloat16 {
  uint16_t bits;
};

struct All {};  // the lanes that are meant; see Some

#ifdef __AVX512F__

constexpr int kLanes = 16;
using Floats = __m512;
using Ints = __m512i;

// The first `left` lanes.
struct Some {
  explicit Some(int64_t left) : mask(static_cast<__mmask16>((1u << std::clamp<int64_t>(left, 0, kLanes)) - 1)) {}
  __mmask16 mask;
};

inline Floats set1(float v) { return _mm512_set1_ps(v); }
inline Ints set1(int32_t v) { return _mm512_set1_epi32(v); }
inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b where one is a NaN
inline Ints max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
inline Floats keep_nan(Floats v, Floats old) {
  return _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(old, old, _CMP_UNORD_Q), old);
}
inline bool is_zero(Floats v) { return _mm512_cmp_ps_mask(v, Floats{}, _CMP_NEQ_UQ) == 0; }
inline Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Ints round(Floats v) { return _mm512_cvtps_epi32(v); }
inline Ints lanes() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline Ints permute(Ints v, Ints index) { return _mm512_permutexvar_epi32(index, v); }
inline Ints shift_left(Ints v, int bits) { return _mm512_slli_epi32(v, bits); }
inline Ints shift_right(Ints v, int bits) { return _mm512_srli_epi32(v, bits); }

inline Floats load(const float* p, All = {}) { return _mm512_loadu_ps(p); }
inline Floats load(const float* p, Some which) { return _mm512_maskz_loadu_ps(which.mask, p); }
inline void store(float* p, Floats v, All = {}) { _mm512_storeu_ps(p, v); }
inline void store(float* p, Floats v, Some which) { _mm512_mask_storeu_ps(p, which.mask, v); }
inline Ints load_words(const void* p) { return _mm512_loadu_si512(p); }
inline void store_words(void* p, Ints v) { _mm512_storeu_si512(p, v); }

inline __m256i load_halves(const void* p, All = {}) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m256i load_halves(const void* p, Some which) { return _mm256_maskz_loadu_epi16(which.mask, p); }
inline __m128i load_bytes(const void* p, All = {}) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i load_bytes(const void* p, Some which) { return _mm_maskz_loadu_epi8(which.mask, p); }

template <class Which = All>
inline Floats load(const BFloat16* p, Which which = {}) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_halves(p, which)), 16));
}
inline __m256i to_bfloat16(Floats v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
inline void store(BFloat16* p, Floats v, All = {}) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(v));
}
inline void store(BFloat16* p, Floats v, Some which) { _mm256_mask_storeu_epi16(p, which.mask, to_bfloat16(v)); }

template <class Which = All>
inline Ints load_ints(const uint8_t* p, Which which = {}) {
  return _mm512_cvtepu8_epi32(load_bytes(p, which));
}
// Those above 255 as 255; none is negative.
inline void store_ints(uint8_t* p, Ints v, All = {}) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(v));
}
inline void store_ints(uint8_t* p, Ints v, Some which) {
  _mm_mask_storeu_epi8(p, which.mask, _mm512_cvtusepi32_epi8(v));
}
// Two vectors as 32 bytes, none below `least` or above 255.
inline void store_ints(uint8_t* p, Ints a, Ints b, int32_t least) {
  const Ints halves = _mm512_packs_epi32(a, b);
  const Ints bytes = _mm512_max_epu8(_mm512_packus_epi16(halves, halves), _mm512_set1_epi8(static_cast<char>(least)));
  const Ints order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(permute(bytes, order)));
}

// Vectors whose elements are bytes, of which there may be less than a whole one.
inline Ints load_bytes(const uint8_t* p, int64_t left) {
  return _mm512_maskz_loadu_epi8(left < 64 ? (__mmask64{1} << left) - 1 : ~__mmask64{0}, p);
}
inline void store_bytes(uint8_t* p, Ints v, int64_t left) {
  _mm512_mask_storeu_epi8(p, left < 64 ? (__mmask64{1} << left) - 1 : ~__mmask64{0}, v);
}
inline Ints max_bytes(Ints a, Ints b) { return _mm512_max_epu8(a, b); }

// The first words of a vector: of kLanes values of 4, 2 or 1 bytes.
template <int kBytes>
inline Ints load_values(const char* p) {
  if constexpr (kBytes == 4) return load_words(p);
  if constexpr (kBytes == 2) return _mm512_castsi256_si512(load_halves(p));
  return _mm512_castsi128_si512(load_bytes(p));
}

#else

constexpr int kLanes = 8;
using Floats = __m256;
using Ints = __m256i;

struct Some {
  explicit Some(int64_t left) : count(static_cast<int>(std::clamp<int64_t>(left, 0, kLanes))) {}
  int count;
};

inline Floats set1(float v) { return _mm256_set1_ps(v); }
inline Ints set1(int32_t v) { return _mm256_set1_epi32(v); }
inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Ints max(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
inline Floats keep_nan(Floats v, Floats old) {
  return _mm256_blendv_ps(v, old, _mm256_cmp_ps(old, old, _CMP_UNORD_Q));
}
inline bool is_zero(Floats v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, Floats{}, _CMP_NEQ_UQ)) == 0; }
inline Floats to_float(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Ints round(Floats v) { return _mm256_cvtps_epi32(v); }
inline Ints lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
inline Ints permute(Ints v, Ints index) { return _mm256_permutevar8x32_epi32(v, index); }
inline Ints shift_left(Ints v, int bits) { return _mm256_slli_epi32(v, bits); }
inline Ints shift_right(Ints v, int bits) { return _mm256_srli_epi32(v, bits); }

// Through memory of a whole vector where there is less: the end of a row of channels.
template <class T>
struct Vector {
  T values[kLanes] = {};
  Vector() = default;
  Vector(const T* p, Some which) { std::copy_n(p, which.count, values); }
};

inline Floats load(const float* p, All = {}) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats v, All = {}) { _mm256_storeu_ps(p, v); }
inline Ints load_words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_words(void* p, Ints v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline __m128i load_halves(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline Floats load(const BFloat16* p, All = {}) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p)), 16));
}
// To the nearest, ties to even; a NaN stays one.
inline void store(BFloat16* p, Floats v, All = {}) {
  const Ints bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), set1(1));
  const Ints rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), set1(0x7fff));
  const Ints quiet = _mm256_or_si256(bits, set1(0x400000));
  const Ints is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const Ints halves = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

inline Ints load_ints(const uint8_t* p, All = {}) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline void store_ints(uint8_t* p, Ints v, All = {}) {
  const Ints at_most = _mm256_min_epi32(v, set1(255));
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(at_most), _mm256_extracti128_si256(at_most, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
}

template <class T>
inline Floats load(const T* p, Some which) {
  return load(Vector<T>(p, which).values);
}
template <class T>
inline void store(T* p, Floats v, Some which) {
  Vector<T> whole;
  store(whole.values, v);
  std::copy_n(whole.values, which.count, p);
}
inline Ints load_ints(const uint8_t* p, Some which) { return load_ints(Vector<uint8_t>(p, which).values); }
inline void store_ints(uint8_t* p, Ints v, Some which) {
  Vector<uint8_t> whole;
  store_ints(whole.values, v);
  std::copy_n(whole.values, which.count, p);
}

inline Ints load_bytes(const uint8_t* p, int64_t left) {
  if (left >= 32) return load_words(p);
  uint8_t whole[32] = {};
  std::copy_n(p, left, whole);
  return load_words(whole);
}
inline void store_bytes(uint8_t* p, Ints v, int64_t left) {
  if (left >= 32) return store_words(p, v);
  uint8_t whole[32];
  store_words(whole, v);
  std::copy_n(whole, left, p);
}
inline Ints max_bytes(Ints a, Ints b) { return _mm256_max_epu8(a, b); }

template <int kBytes>
inline Ints load_values(const char* p) {
  static_assert(kBytes == 4);
  return load_words(p);
}

#endif

inline float to_float(float v) { return v; }
inline float to_float(BFloat16 v) { return std::bit_cast<float>(uint32_t{v.bits} << 16); }

// `count` values as float32.
inline void widen(float* to, const BFloat16* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; i++) to[i] = to_float(from[i]);
}

}  // namespace resnet_fused::cpu::RESNET_FUSED_LANES
