// What the launchers of batch norm's backward share with those of the stem's.
#pragma once

#include "bn_backward.cuh"
#include "launch.h"

namespace resnet_fused {

inline void check_backward(const char* op, const Tensor& x, int64_t C, const Tensor& scale, const Tensor& shift,
                           const Tensor& mean, const Tensor& invstd) {
  check_vector(op, "scale", scale, C, x);
  check_vector(op, "shift", shift, C, x);
  check_vector(op, "mean", mean, C, x);
  check_vector(op, "invstd", invstd, C, x);
}

inline void check_sums(const char* op, const Tensor& x, int64_t C, const OptionalTensor& sum_dy,
                       const OptionalTensor& sum_dy_xhat) {
  STD_TORCH_CHECK(sum_dy.has_value() == sum_dy_xhat.has_value(), op, ": sum_dy and sum_dy_xhat come together");
  if (!sum_dy.has_value()) return;
  check_vector(op, "sum_dy", *sum_dy, C, x);
  check_vector(op, "sum_dy_xhat", *sum_dy_xhat, C, x);
}

// The second stage: partials [2, rows, C] to two vectors.
std::tuple<Tensor, Tensor> reduce_two(const Device& device, const Tensor& partials);

}  // namespace resnet_fused
