// Float values as the nearest points of a grid of 256, what lies beyond its ends becoming them; and means of 8 bits.
#pragma once

#include "conv.h"

namespace resnet_fused::cpu::avx512 {

// Values [begin, end) of x and q.
void quantise(const float* x, Grid grid, uint8_t* q, int64_t begin, int64_t end);

// Sixteen channels a unit: of image unit / ceil(channels / 16), the means over its pixels as floats.
void mean(const uint8_t* x, Grid grid, int64_t pixels, int64_t channels, float* y, int64_t begin, int64_t end);

}  // namespace resnet_fused::cpu::avx512
