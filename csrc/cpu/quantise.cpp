#include "quantise.h"

#include <algorithm>

#include "epilogue.h"

namespace resnet_fused::cpu {

void avx512::quantise(const float* x, Grid grid, uint8_t* q, int64_t begin, int64_t end) {
  int64_t at = begin;
  for (; at + 16 <= end; at += 16) store(q + at, load(x + at, grid), grid);
  if (at < end) {
    float rest[16] = {};
    uint8_t rounded[16];
    std::copy(x + at, x + end, rest);
    store(rounded, load(rest, grid), grid);
    std::copy_n(rounded, end - at, q + at);
  }
}

}  // namespace resnet_fused::cpu
