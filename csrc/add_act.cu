#include "add_act.cuh"

#include "ops.h"
#include "walk.h"

namespace resnet_fused {
namespace {

template <class Launch>
Tensor combine(const char* op, const Named& like, const Named& other, Launch launch) {
  const Activation a = check_activations(op, {like, other});
  const Device device(*like.tensor);
  const Tensor result = torch::stable::empty_like(*like.tensor);
  if (a.count() > 0) dispatch(a.dtype, [&](auto type) { launch(type, device, a, result); });
  return result;
}

}  // namespace

Tensor add_act(const Tensor& x, const Tensor& other, bool relu) {
  return combine("add_act", {"x", &x}, {"other", &other},
                 [&](auto type, const Device& device, const Activation& a, const Tensor& y) {
                   using T = decltype(type);
                   const auto kernel = add_act_kernel<T>;
                   const auto [grid, walk] =
                       make_walk(device, kernel, a, Channels::kEach, aligned({data<T>(x), data<T>(other), out<T>(y)}));
                   device.launch(kernel, grid, data<T>(x), data<T>(other), out<T>(y), relu, walk);
                 });
}

Tensor add_act_backward(const Tensor& dy, const Tensor& y) {
  return combine("add_act_backward", {"y", &y}, {"dy", &dy},
                 [&](auto type, const Device& device, const Activation& a, const Tensor& dz) {
                   using T = decltype(type);
                   const auto kernel = add_act_backward_kernel<T>;
                   const auto [grid, walk] =
                       make_walk(device, kernel, a, Channels::kEach, aligned({data<T>(dy), data<T>(y), out<T>(dz)}));
                   device.launch(kernel, grid, data<T>(dy), data<T>(y), out<T>(dz), walk);
                 });
}

}  // namespace resnet_fused
