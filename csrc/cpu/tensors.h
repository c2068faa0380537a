// What all operators ask of tensors.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "memory.h"

namespace resnet_fused::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline bool is_nhwc(const Tensor& t) {
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

inline int bytes_of(ScalarType t) {
  return t == ScalarType::Byte || t == ScalarType::Char ? 1 : t == ScalarType::BFloat16 ? 2 : 4;
}

// A large result, in memory that is kept: asking the system for its pages costs as much as the pass that fills them.
inline Tensor kept(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) {
  int64_t bytes = bytes_of(dtype);
  for (const int64_t size : sizes) bytes *= size;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(take(std::max<int64_t>(bytes, 1)), sizes, strides, cpu, dtype, give_back);
}

inline Tensor empty_nhwc(const std::vector<int64_t>& sizes, ScalarType dtype) {
  return kept(sizes, {sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]}, dtype);
}

}  // namespace resnet_fused::cpu
