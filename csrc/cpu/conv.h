// A convolution of a frozen network on a CPU: y = act(scale * conv(x, w) + bias + residual), all in NHWC order.
#pragma once

#include <cstdint>

namespace resnet_fused::cpu {

constexpr int kColumns = 32;  // output channels of one block of packed weights
constexpr int kWord = 4;      // bytes of x that one step of a dot product takes: 1 float, 2 bfloat16 or 4 uint8

// What 8 bits stand for: scale * (q - zero_point).
struct Grid {
  float scale = 1;
  int32_t zero_point = 0;
};

// Sizes count images, pixels and channels. Weights are packed [K / 32, R, S * group / g, 32, g] with g values to a word,
// zeros where K ends within a block; for Winograd's algorithm the 16 elements of G w G' in place of R x S.
struct Conv {
  int64_t n, h, w, c, k, r, s, oh, ow;
  int64_t group;  // the input channels that an output channel sees: c, or those of its group
  int64_t stride_h, stride_w, pad_h, pad_w;
  const void *x, *weight;
  const float *scale, *bias;  // of each output channel; scale is null where it is one
  const void* residual;       // null where nothing is added; y itself where that is overwritten
  void* y;
  bool relu;
  Grid x_grid, residual_grid, y_grid;  // of 8-bit tensors
};

// The work is split into `units(conv)` equal parts, of which a thread runs a range.
struct Kernel {
  int64_t (*units)(const Conv&);
  void (*run)(const Conv&, int64_t begin, int64_t end);
};

// One kernel for each (type of x, type of y), by the instructions it needs.
namespace avx512 {
extern const Kernel float32, winograd, bfloat16, int8, int8_to_float32;
extern const Kernel grouped_float32, grouped_bfloat16, grouped_int8, grouped_int8_to_float32;
}
namespace amx {
extern const Kernel bfloat16, int8, int8_to_float32;
}

}  // namespace resnet_fused::cpu
