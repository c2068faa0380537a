// Batch norm in training on a CPU, with ReLU, residual and the stem's max pool: what its kernels take.
#pragma once

#include <cstdint>

namespace resnet_fused::cpu {

// The kernels see an activation in NHWC order as rows of `width` values, of which each has a place in the vectors: the
// channels of a pixel, or of 16 pixels where those of one do not fill vectors. They run values [begin, end); begin is
// the start of a row, and so is end, or the end of all.

// y = act(x * scale + shift + residual), which has a map of its own or none.
struct NormForward {
  int64_t width;
  const void* x;
  const float *scale, *shift;
  const void* residual;                           // or null
  const float *residual_scale, *residual_shift;  // or null
  bool relu;
  void* y;
  uint8_t* mask;  // a bit a value: whether the gradient passes; or null
};

// Of dz = dy behind ReLU's mask: its sums, and dx = scale * dz + slope * (x - mean) + offset.
struct NormBackward {
  int64_t width;
  const void *dy, *x;
  const uint8_t* mask;  // null: recomputed from x
  const float *scale, *shift, *mean;
  const float *slope, *offset;  // null where the statistics were constants
  bool relu;
  void *dx, *dz;  // dz may be null
};

// max_pool(relu(x * scale + shift)), 3x3 with stride 2 and padding 1, and its backward, where dz is each window's
// gradient at its winner. Sizes count images, pixels and channels; oh and ow are those of the pooled image.
struct NormPool {
  int64_t n, h, w, c, oh, ow;
  const void* x;
  const float *scale, *shift, *mean, *slope, *offset;
  const void* dy;
  const uint8_t* index;  // 3 * r + s of each window's winner
  void *y, *dx;
  uint8_t* winners;
};

// From the merged statistics of a batch to its affine map, and the running statistics; any vector of float32 may be null.
struct NormFinalize {
  int64_t channels;
  double count, momentum, eps;
  const double *means, *deviations;
  const float *weight, *bias;
  float *running_mean, *running_var;
  float *scale, *shift, *mean, *invstd;
};

// `bytes` of a value: 4 is float32, 2 bfloat16. Sums are added to what is there.
struct NormKernels {
  // Sums of x - center, and of its squares.
  void (*moments)(const void* x, int bytes, const float* center, int64_t width, int64_t begin, int64_t end, float* sums,
                  float* squares);
  void (*apply)(const NormForward&, int bytes, int64_t begin, int64_t end);
  // Sums of dz, and of dz * (x - mean).
  void (*backward_sums)(const NormBackward&, int bytes, int64_t begin, int64_t end, float* sums, float* products);
  void (*backward_apply)(const NormBackward&, int bytes, int64_t begin, int64_t end);
  // y = act(x + other); dz = dy where y is not <= 0.
  void (*add)(const void* x, const void* other, bool relu, void* y, int bytes, int64_t begin, int64_t end);
  void (*add_backward)(const void* dy, const void* y, void* dz, int bytes, int64_t begin, int64_t end);
  // Rows [begin, end) of the pooled image, counted through all images.
  void (*pool)(const NormPool&, int bytes, int64_t begin, int64_t end);
  // Rows [begin, end) of the image.
  void (*pool_backward_sums)(const NormPool&, int bytes, int64_t begin, int64_t end, float* sums, float* products);
  void (*pool_backward_apply)(const NormPool&, int bytes, int64_t begin, int64_t end);
  // The mean of the first of `pixels`, at most four, zero where it is not finite.
  void (*center)(const void* x, int bytes, int64_t channels, int64_t pixels, float* center);
  // The mean and the squared deviations of n pixels from their `moments`; the center becomes the mean. False where the
  // center was so far away that digits are lost.
  bool (*summarise)(double n, int64_t channels, int64_t copies, float* center, float* sums, float* squares, double* mean,
                    float* m2);
  void (*finalize)(const NormFinalize&);
  // total[i] += values[i], of `count`.
  void (*accumulate)(const float* values, int64_t count, double* total);
  // Counts and means merged: mean[i] += n * means[i]; then m2[i] += m2s[i] + n * (means[i] - mean[i])^2.
  void (*merge_means)(double n, const double* means, int64_t count, double* mean);
  void (*merge_squares)(double n, const double* means, const float* m2s, const double* mean, int64_t count, double* m2);
};

}  // namespace resnet_fused::cpu
