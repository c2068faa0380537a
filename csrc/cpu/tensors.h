// What all operators ask of tensors.
#pragma once

#include <optional>

#include <torch/csrc/stable/tensor.h>

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

}  // namespace resnet_fused::cpu
