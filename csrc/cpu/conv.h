// A convolution of a frozen network on a CPU: y = act(scale * conv(x, w) + bias + residual), all in NHWC order.
#pragma once

#include <cstdint>

#include "norm.h"

namespace resnet_fused::cpu {

constexpr int kWord = 4;  // bytes of x that one step of a dot product takes: 1 float, 2 bfloat16 or 4 uint8

// What 8 bits stand for: scale * (q - zero_point).
struct Grid {
  float scale = 1;
  int32_t zero_point = 0;
};

// Sizes count images, pixels and channels. Weights are packed [K / columns, R, S * group / g, columns, g] with g values
// to a word, zeros where K ends within a block; for Winograd's algorithm the 16 elements of G w G' in place of R x S.
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

// A kernel for each (type of x, type of y); without functions where there is none.
struct Algorithm {
  Kernel float32, bfloat16, int8, int8_to_float32;
};

// Max pooling in NHWC order; padding is no value, a NaN within a window is its result. Sizes count images, pixels and
// channels, which are a multiple of 16.
struct MaxPool {
  int64_t n, h, w, c, r, s, oh, ow;
  int64_t stride_h, stride_w, pad_h, pad_w;
  const void* x;
  void* y;
};

// Means over the pixels of each image, in NHWC order.
struct Mean {
  int64_t pixels, channels;
  const void* x;
  void* y;
  Grid x_grid;  // of 8 bits
};

// What is written for vectors of one width; `bytes` of a value: 4 is float32, 2 bfloat16, 1 uint8.
struct Kernels {
  int columns;  // output channels of one block of packed weights
  Algorithm direct, grouped;
  bool widens;  // bfloat16 is multiplied in float32, which its weights are packed in
  Algorithm winograd;

  // Output rows [begin, end), counted through all images.
  void (*max_pool)(const MaxPool& pool, int bytes, int64_t begin, int64_t end);
  // Values [begin, end) of x as the nearest points of a grid of 256, what lies beyond its ends becoming them; whether
  // all are finite.
  bool (*quantise)(const void* x, int bytes, Grid grid, uint8_t* q, int64_t begin, int64_t end);
  // A vector of channels a unit, image by image. y is float32 or bfloat16, and x's type where x is no 8 bits.
  void (*mean)(const Mean& mean, int x_bytes, int y_bytes, int64_t begin, int64_t end);
  NormKernels norm;
};

// Of the widest vectors that this CPU has, for what multiplies nothing; null where there are none.
const Kernels* other_kernels();

extern const Kernels avx2_kernels, avx512_kernels;
extern const Algorithm amx_tiles;  // direct

}  // namespace resnet_fused::cpu
