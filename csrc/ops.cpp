// Schemas and registration. The stable ABI keeps the library loadable in every torch from 2.10 on.
#include "ops.h"

#include <torch/csrc/stable/library.h>

// A namespace each: the library for CUDA tensors and the one executed on the CPU may be loaded into one process.
#ifdef RESNET_FUSED_HOST
#define NAMESPACE resnet_fused_host
#define DEVICE CPU
#else
#define NAMESPACE resnet_fused_cuda
#define DEVICE CUDA
#endif
// The macros of the library paste their arguments; here they are expanded first.
#define DEFINE(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define IMPLEMENT(ns, device, m) STABLE_TORCH_LIBRARY_IMPL(ns, device, m)

DEFINE(NAMESPACE, m) {
  m.def("bn_stats(Tensor x, SymInt rows) -> (Tensor mean, Tensor m2, Tensor count)");
  m.def(
      "bn_finalize(Tensor mean, Tensor m2, Tensor count, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, "
      "float momentum, float eps) -> (Tensor scale, Tensor shift, Tensor save_mean, Tensor save_invstd)");
  m.def(
      "bn_apply(Tensor x, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale, Tensor? "
      "residual_shift, bool relu, bool with_mask) "
      "-> (Tensor y, Tensor mask)");
  m.def(
      "bn_backward_reduce(Tensor dy, Tensor x, Tensor? mask, Tensor scale, Tensor shift, Tensor mean, Tensor invstd, "
      "bool relu, SymInt rows) "
      "-> (Tensor sum_dy, Tensor sum_dy_xhat)");
  m.def(
      "bn_backward_apply(Tensor dy, Tensor x, Tensor? mask, Tensor scale, Tensor shift, Tensor mean, Tensor invstd, "
      "Tensor? sum_dy, "
      "Tensor? sum_dy_xhat, float count, bool relu, bool with_dresidual) -> (Tensor dx, Tensor dresidual)");
  m.def("add_act(Tensor x, Tensor other, bool relu) -> Tensor");
  m.def("add_act_backward(Tensor dy, Tensor y) -> Tensor");
  m.def("bn_act_max_pool(Tensor x, Tensor scale, Tensor shift) -> (Tensor y, Tensor index)");
  m.def(
      "bn_act_max_pool_backward_reduce(Tensor dy, Tensor index, Tensor x, Tensor scale, Tensor shift, Tensor mean, "
      "Tensor invstd, SymInt rows) "
      "-> (Tensor sum_dy, Tensor sum_dy_xhat)");
  m.def(
      "bn_act_max_pool_backward_apply(Tensor dy, Tensor index, Tensor x, Tensor scale, Tensor shift, Tensor mean, "
      "Tensor invstd, Tensor? sum_dy, "
      "Tensor? sum_dy_xhat, float count) -> Tensor");
  m.def("reduce_rows(Tensor partials) -> Tensor");
  m.def("pack_weight(Tensor weight, bool flip) -> Tensor");
}

IMPLEMENT(NAMESPACE, DEVICE, m) {
  m.impl("bn_stats", TORCH_BOX(&resnet_fused::bn_stats));
  m.impl("bn_finalize", TORCH_BOX(&resnet_fused::bn_finalize));
  m.impl("bn_apply", TORCH_BOX(&resnet_fused::bn_apply));
  m.impl("bn_backward_reduce", TORCH_BOX(&resnet_fused::bn_backward_reduce));
  m.impl("bn_backward_apply", TORCH_BOX(&resnet_fused::bn_backward_apply));
  m.impl("add_act", TORCH_BOX(&resnet_fused::add_act));
  m.impl("add_act_backward", TORCH_BOX(&resnet_fused::add_act_backward));
  m.impl("bn_act_max_pool", TORCH_BOX(&resnet_fused::bn_act_max_pool));
  m.impl("bn_act_max_pool_backward_reduce", TORCH_BOX(&resnet_fused::bn_act_max_pool_backward_reduce));
  m.impl("bn_act_max_pool_backward_apply", TORCH_BOX(&resnet_fused::bn_act_max_pool_backward_apply));
  m.impl("reduce_rows", TORCH_BOX(&resnet_fused::reduce_rows));
  m.impl("pack_weight", TORCH_BOX(&resnet_fused::pack_weight));
}
