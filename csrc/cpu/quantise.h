// Float values as the nearest points of a grid of 256; and means of 8 bits.
#pragma once

#include <algorithm>

#include "conv.h"
#include "lanes.h"

namespace resnet_fused::cpu::RESNET_FUSED_LANES {

// Rounded before the zero point is added, as PyTorch does.
template <class Which = All>
void quantise(const float* x, Grid grid, uint8_t* q, Which which = {}) {
  const Ints steps = round(load(x, which) * set1(1 / grid.scale));
  store_ints(q, max(add(steps, set1(grid.zero_point)), Ints{}), which);
}

inline void quantise(const float* x, Grid grid, uint8_t* q, int64_t begin, int64_t end) {
  int64_t at = begin;
  for (; at + kLanes <= end; at += kLanes) quantise(x + at, grid, q + at);
  if (at < end) quantise(x + at, grid, q + at, Some(end - at));
}

inline void mean(const uint8_t* x, Grid grid, int64_t pixels, int64_t channels, float* y, int64_t begin, int64_t end) {
  const int64_t blocks = (channels + kLanes - 1) / kLanes;
  const Ints zeros = set1(static_cast<int32_t>(grid.zero_point * pixels));
  for (int64_t unit = begin; unit < end; unit++) {
    const int64_t image = unit / blocks, channel = unit % blocks * kLanes;
    const Some which(channels - channel);
    const uint8_t* from = x + image * pixels * channels + channel;
    Ints sum = {};
    for (int64_t pixel = 0; pixel < pixels; pixel++, from += channels) sum = add(sum, load_ints(from, which));
    const Floats mean = to_float(subtract(sum, zeros)) * set1(grid.scale / static_cast<float>(pixels));
    store(y + image * channels + channel, mean, which);
  }
}

}  // namespace resnet_fused::cpu::RESNET_FUSED_LANES
