// The ops of the library, one launcher each. Their meaning is in docs/design.md; the schemas are in ops.cpp.
#pragma once

#include <optional>
#include <tuple>

#include <torch/csrc/stable/tensor.h>

namespace resnet_fused {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> bn_stats(const Tensor& x, int64_t rows);
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_finalize(const Tensor& mean, const Tensor& m2, const Tensor& count,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       const OptionalTensor& running_mean,
                                                       const OptionalTensor& running_var, double momentum, double eps);
std::tuple<Tensor, Tensor> bn_apply(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                    const OptionalTensor& residual, const OptionalTensor& residual_scale,
                                    const OptionalTensor& residual_shift, bool relu, bool with_mask);
std::tuple<Tensor, Tensor> bn_backward_reduce(const Tensor& dy, const Tensor& x, const OptionalTensor& mask,
                                              const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                              const Tensor& invstd, bool relu, int64_t rows);
std::tuple<Tensor, Tensor> bn_backward_apply(const Tensor& dy, const Tensor& x, const OptionalTensor& mask,
                                             const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                             const Tensor& invstd, const OptionalTensor& sum_dy,
                                             const OptionalTensor& sum_dy_xhat, double count, bool relu,
                                             bool with_dresidual);
Tensor add_act(const Tensor& x, const Tensor& other, bool relu);
Tensor add_act_backward(const Tensor& dy, const Tensor& y);
std::tuple<Tensor, Tensor> bn_act_max_pool(const Tensor& x, const Tensor& scale, const Tensor& shift);
std::tuple<Tensor, Tensor> bn_act_max_pool_backward_reduce(const Tensor& dy, const Tensor& index, const Tensor& x,
                                                           const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                                           const Tensor& invstd, int64_t rows);
Tensor bn_act_max_pool_backward_apply(const Tensor& dy, const Tensor& index, const Tensor& x, const Tensor& scale,
                                      const Tensor& shift, const Tensor& mean, const Tensor& invstd,
                                      const OptionalTensor& sum_dy, const OptionalTensor& sum_dy_xhat, double count);
Tensor reduce_rows(const Tensor& partials);
Tensor pack_weight(const Tensor& weight, bool flip);

}  // namespace resnet_fused
