// The stem's batch norm, ReLU and max pool in training as operators, with the schemas of the CUDA ones.
#include <torch/csrc/stable/library.h>

#include "norm_tensors.h"

namespace resnet_fused::cpu {
namespace {

// The stem's pool reads pixels, and vectors as they are.
NormPool pool_of(const Tensor& x) {
  NormPool p{.n = x.size(0), .h = x.size(2), .w = x.size(3), .c = x.size(1)};
  p.oh = (p.h - 1) / 2 + 1, p.ow = (p.w - 1) / 2 + 1;
  p.x = x.const_data_ptr();
  return p;
}

Tensor pooled(const NormPool& p, ScalarType dtype) {
  return empty_nhwc({p.n, p.c, p.oh, p.ow}, dtype);
}

std::tuple<Tensor, Tensor> bn_act_max_pool(const Tensor& x, const Tensor& scale, const Tensor& shift) {
  const char* const op = "bn_act_max_pool";
  const Activation a(op, x);
  NormPool p = pool_of(x);
  p.scale = vector_of(op, "scale", scale, a.channels), p.shift = vector_of(op, "shift", shift, a.channels);
  const Tensor y = pooled(p, x.scalar_type()), index = pooled(p, ScalarType::Byte);
  p.y = y.mutable_data_ptr(), p.winners = data<uint8_t>(index);
  torch::stable::parallel_for(0, p.n * p.oh, 1, [&](int64_t begin, int64_t end) { kernels().pool(p, a.bytes, begin, end); });
  return {y, index};
}

NormPool pool_backward_of(const char* op, const Activation& a, const Tensor& dy, const Tensor& index, const Tensor& x,
                          const Tensor& scale, const Tensor& shift, const Tensor& mean) {
  NormPool p = pool_of(x);
  for (const auto& [name, t, dtype] : {std::tuple{"dy", &dy, x.scalar_type()}, {"index", &index, ScalarType::Byte}}) {
    const bool fits = t->dim() == 4 && t->size(0) == p.n && t->size(1) == p.c && t->size(2) == p.oh &&
                      t->size(3) == p.ow && t->scalar_type() == dtype && is_nhwc(*t);
    STD_TORCH_CHECK(fits, op, ": ", name, " must be of the pooled ", text(x), " in NHWC order, got ", text(*t));
  }
  p.dy = dy.const_data_ptr(), p.index = static_cast<const uint8_t*>(index.const_data_ptr());
  p.scale = vector_of(op, "scale", scale, a.channels), p.shift = vector_of(op, "shift", shift, a.channels);
  p.mean = vector_of(op, "mean", mean, a.channels);
  return p;
}

std::tuple<Tensor, Tensor> bn_act_max_pool_backward_reduce(const Tensor& dy, const Tensor& index, const Tensor& x,
                                                           const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                                           const Tensor& invstd, int64_t rows) {
  const char* const op = "bn_act_max_pool_backward_reduce";
  const Activation a(op, x);
  STD_TORCH_CHECK(rows >= 1, op, ": a reduction needs at least one row, got rows=", rows);
  const NormPool p = pool_backward_of(op, a, dy, index, x, scale, shift, mean);
  const int64_t step = std::max<int64_t>(kSummed / std::max<int64_t>(p.w * p.c, 1), 1);
  return summed(op, a, invstd, a.channels, p.n * p.h, step,
                [&](int64_t begin, int64_t end, float* sums, float* products) {
                  kernels().pool_backward_sums(p, a.bytes, begin, end, sums, products);
                });
}

Tensor bn_act_max_pool_backward_apply(const Tensor& dy, const Tensor& index, const Tensor& x, const Tensor& scale,
                                      const Tensor& shift, const Tensor& mean, const Tensor& invstd,
                                      const OptionalTensor& sum_dy, const OptionalTensor& sum_dy_xhat, double count) {
  const char* const op = "bn_act_max_pool_backward_apply";
  const Activation a(op, x);
  NormPool p = pool_backward_of(op, a, dy, index, x, scale, shift, mean);
  Vectors v(op, a, scale, shift, mean);
  v.close(op, a, invstd, sum_dy, sum_dy_xhat, count);
  p.slope = v.or_null(v.slope), p.offset = v.or_null(v.offset);
  const Tensor dx = kept_like(x);
  p.dx = dx.mutable_data_ptr();
  torch::stable::parallel_for(0, p.n * p.h, 1, [&](int64_t begin, int64_t end) {
    kernels().pool_backward_apply(p, a.bytes, begin, end);
  });
  return dx;
}

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("bn_act_max_pool(Tensor x, Tensor scale, Tensor shift) -> (Tensor y, Tensor index)");
  m.def(
      "bn_act_max_pool_backward_reduce(Tensor dy, Tensor index, Tensor x, Tensor scale, Tensor shift, Tensor mean, "
      "Tensor invstd, SymInt rows) -> (Tensor sum_dy, Tensor sum_dy_xhat)");
  m.def(
      "bn_act_max_pool_backward_apply(Tensor dy, Tensor index, Tensor x, Tensor scale, Tensor shift, Tensor mean, "
      "Tensor invstd, Tensor? sum_dy, Tensor? sum_dy_xhat, float count) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("bn_act_max_pool", TORCH_BOX(&resnet_fused::cpu::bn_act_max_pool));
  m.impl("bn_act_max_pool_backward_reduce", TORCH_BOX(&resnet_fused::cpu::bn_act_max_pool_backward_reduce));
  m.impl("bn_act_max_pool_backward_apply", TORCH_BOX(&resnet_fused::cpu::bn_act_max_pool_backward_apply));
}
