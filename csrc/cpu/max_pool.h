// Max pooling in NHWC order; padding is no value, a NaN within a window is its result.
#pragma once

#include <cstdint>

namespace resnet_fused::cpu {

// Sizes count images, pixels and channels, which are a multiple of 16.
struct MaxPool {
  int64_t n, h, w, c, r, s, oh, ow;
  int64_t stride_h, stride_w, pad_h, pad_w;
  const void* x;
  void* y;
};

namespace avx512 {
// Output rows [begin, end), counted through all images; `bytes` of a value: 4 is float32, 2 bfloat16, 1 uint8.
void max_pool(const MaxPool& pool, int bytes, int64_t begin, int64_t end);
}  // namespace avx512

}  // namespace resnet_fused::cpu
