#include "quantise.h"

#include <immintrin.h>

#include <algorithm>

namespace resnet_fused::cpu {

namespace {

// Rounded before the zero point is added, as PyTorch does.
void quantise(const float* x, Grid grid, uint8_t* q) {
  const __m512i steps = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(1 / grid.scale)));
  const __m512i above = _mm512_max_epi32(_mm512_add_epi32(steps, _mm512_set1_epi32(grid.zero_point)), __m512i{});
  _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtusepi32_epi8(above));
}

}  // namespace

void avx512::quantise(const float* x, Grid grid, uint8_t* q, int64_t begin, int64_t end) {
  int64_t at = begin;
  for (; at + 16 <= end; at += 16) cpu::quantise(x + at, grid, q + at);
  if (at < end) {
    float rest[16] = {};
    uint8_t rounded[16];
    std::copy(x + at, x + end, rest);
    cpu::quantise(rest, grid, rounded);
    std::copy_n(rounded, end - at, q + at);
  }
}

}  // namespace resnet_fused::cpu
