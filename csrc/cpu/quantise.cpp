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

void avx512::mean(const uint8_t* x, Grid grid, int64_t pixels, int64_t channels, float* y, int64_t begin, int64_t end) {
  const int64_t blocks = (channels + 15) / 16;
  const __m512i zeros = _mm512_set1_epi32(static_cast<int32_t>(grid.zero_point * pixels));
  for (int64_t unit = begin; unit < end; unit++) {
    const int64_t image = unit / blocks, channel = unit % blocks * 16;
    const auto which = static_cast<__mmask16>((1u << std::min<int64_t>(channels - channel, 16)) - 1);
    const uint8_t* from = x + image * pixels * channels + channel;
    __m512i sum = {};
    for (int64_t pixel = 0; pixel < pixels; pixel++, from += channels)
      sum = _mm512_add_epi32(sum, _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(which, from)));
    const __m512 step = _mm512_set1_ps(grid.scale / static_cast<float>(pixels));
    const __m512 mean = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, zeros)), step);
    _mm512_mask_storeu_ps(y + image * channels + channel, which, mean);
  }
}

}  // namespace resnet_fused::cpu
