// Float values as the nearest points of a grid of 256; what lies beyond its ends becomes them.
#pragma once

#include "conv.h"

namespace resnet_fused::cpu::avx512 {

// Values [begin, end) of x and q.
void quantise(const float* x, Grid grid, uint8_t* q, int64_t begin, int64_t end);

}  // namespace resnet_fused::cpu::avx512
