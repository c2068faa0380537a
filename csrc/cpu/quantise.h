// Float values as the nearest points of a grid of 256; and means over pixels.
#pragma once

#include <algorithm>

#include "conv.h"
#include "lanes.h"

namespace resnet_fused::cpu::RESNET_FUSED_LANES {

// Rounded before the zero point is added, as PyTorch does. Returns the values.
template <class T, class Which = All>
Floats quantise(const T* x, Grid grid, uint8_t* q, Which which = {}) {
  const Floats values = load(x, which);
  const Ints steps = round(values * set1(1 / grid.scale));
  store_ints(q, max(add(steps, set1(grid.zero_point)), Ints{}), which);
  return values;
}

template <class T>
bool quantise_of(const void* from, Grid grid, uint8_t* q, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(from);
  Floats zeros{};  // a zero by what is not finite is a NaN
  int64_t at = begin;
  for (; at + kLanes <= end; at += kLanes) zeros = fmadd(quantise(x + at, grid, q + at), Floats{}, zeros);
  if (at < end) zeros = fmadd(quantise(x + at, grid, q + at, Some(end - at)), Floats{}, zeros);
  return is_zero(zeros);
}

inline bool quantise(const void* x, int bytes, Grid grid, uint8_t* q, int64_t begin, int64_t end) {
  return (bytes == 4 ? quantise_of<float> : quantise_of<BFloat16>)(x, grid, q, begin, end);
}

inline Floats summand(const float* x, Some which) { return load(x, which); }
inline Floats summand(const BFloat16* x, Some which) { return load(x, which); }
inline Ints summand(const uint8_t* x, Some which) { return load_ints(x, which); }

inline Floats mean_of_sum(Floats sum, const Mean& m) { return sum / set1(static_cast<float>(m.pixels)); }
inline Floats mean_of_sum(Ints sum, const Mean& m) {
  const Ints zeros = set1(static_cast<int32_t>(m.x_grid.zero_point * m.pixels));
  return to_float(subtract(sum, zeros)) * set1(m.x_grid.scale / static_cast<float>(m.pixels));
}

template <class X, class Y>
void mean_of(const Mean& m, int64_t begin, int64_t end) {
  constexpr int64_t kTogether = 64;  // longer sums lose digits
  const int64_t blocks = (m.channels + kLanes - 1) / kLanes;
  for (int64_t unit = begin; unit < end; unit++) {
    const int64_t image = unit / blocks, channel = unit % blocks * kLanes;
    const Some which(m.channels - channel);
    const X* x = static_cast<const X*>(m.x) + image * m.pixels * m.channels + channel;
    decltype(summand(x, which)) sum{};
    for (int64_t pixel = 0; pixel < m.pixels;) {
      decltype(sum) part{};
      for (const int64_t last = std::min(pixel + kTogether, m.pixels); pixel < last; pixel++, x += m.channels)
        part = add(part, summand(x, which));
      sum = add(sum, part);
    }
    store(static_cast<Y*>(m.y) + image * m.channels + channel, mean_of_sum(sum, m), which);
  }
}

inline void mean(const Mean& m, int x_bytes, int y_bytes, int64_t begin, int64_t end) {
  if (x_bytes == 1) return (y_bytes == 4 ? mean_of<uint8_t, float> : mean_of<uint8_t, BFloat16>)(m, begin, end);
  (x_bytes == 4 ? mean_of<float, float> : mean_of<BFloat16, BFloat16>)(m, begin, end);
}

}  // namespace resnet_fused::cpu::RESNET_FUSED_LANES
