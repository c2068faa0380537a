#include "bn_finalize.cuh"

#include "launch.h"
#include "ops.h"

namespace resnet_fused {
namespace {

Parameter parameter(const char* name, const OptionalTensor& v, int64_t C, const Tensor& mean, bool written) {
  if (!v.has_value()) return {nullptr, DataType::kFloat};
  const ScalarType type = v->scalar_type();
  STD_TORCH_CHECK(v->dim() == 1 && v->size(0) == C && v->is_contiguous() &&
                      (type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16),
                  "bn_finalize: ", name,
                  " must be a contiguous Float, Half or BFloat16 vector with one value for each of the ", C,
                  " channels, got ", text(*v));
  STD_TORCH_CHECK(v->get_device_index() == mean.get_device_index() && v->is_cuda() == mean.is_cuda(),
                  "bn_finalize: ", name, " must be on the device of mean");
  void* const pointer = written ? v->mutable_data_ptr() : const_cast<void*>(v->const_data_ptr());
  return {pointer, type == ScalarType::Float  ? DataType::kFloat
                   : type == ScalarType::Half ? DataType::kHalf
                                              : DataType::kBFloat16};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_finalize(const Tensor& mean, const Tensor& m2, const Tensor& count,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       const OptionalTensor& running_mean,
                                                       const OptionalTensor& running_var, double momentum, double eps) {
  STD_TORCH_CHECK(mean.dim() == 2 && mean.scalar_type() == ScalarType::Double && mean.is_contiguous(),
                  "bn_finalize: mean must be contiguous Double [rows, C], got ", text(mean));
  const int64_t rows = mean.size(0), C = mean.size(1);
  STD_TORCH_CHECK(same(m2.sizes(), mean.sizes()) && m2.scalar_type() == ScalarType::Float && m2.is_contiguous(),
                  "bn_finalize: m2 must be contiguous Float of the shape of mean, ", text(mean), "; got ", text(m2));
  check_vector("bn_finalize", "count", count, rows, mean);
  const Device device(mean);
  const Tensor scale = float_like(mean, {C}), shift = float_like(mean, {C}), save_mean = float_like(mean, {C}),
               save_invstd = float_like(mean, {C});
  const Finalize p{data<double>(mean),
                   data(m2),
                   data(count),
                   parameter("weight", weight, C, mean, false),
                   parameter("bias", bias, C, mean, false),
                   parameter("running_mean", running_mean, C, mean, true),
                   parameter("running_var", running_var, C, mean, true),
                   out<float>(scale),
                   out<float>(shift),
                   out<float>(save_mean),
                   out<float>(save_invstd),
                   rows,
                   C,
                   momentum,
                   eps};
  if (C > 0) device.launch(bn_finalize_kernel, grid_x("bn_finalize", (C + kWarp - 1) / kWarp), p);
  return {scale, shift, save_mean, save_invstd};
}

}  // namespace resnet_fused
