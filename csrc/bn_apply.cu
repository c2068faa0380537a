#include "bn_apply.cuh"

#include "ops.h"
#include "walk.h"

namespace resnet_fused {

std::tuple<Tensor, Tensor> bn_apply(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                    const OptionalTensor& residual, const OptionalTensor& residual_scale,
                                    const OptionalTensor& residual_shift, bool relu, bool with_mask) {
  const bool adds = residual.has_value();
  const Activation a = adds ? check_activations("bn_apply", {{"x", &x}, {"residual", &*residual}})
                            : check_activations("bn_apply", {{"x", &x}});
  check_vector("bn_apply", "scale", scale, a.C, x);
  check_vector("bn_apply", "shift", shift, a.C, x);
  STD_TORCH_CHECK(residual_scale.has_value() == residual_shift.has_value() && (adds || !residual_scale.has_value()),
                  "bn_apply: residual_scale and residual_shift come together, and with a residual");
  if (residual_scale.has_value()) {
    check_vector("bn_apply", "residual_scale", *residual_scale, a.C, x);
    check_vector("bn_apply", "residual_shift", *residual_shift, a.C, x);
  }
  const Device device(x);
  const Tensor y = torch::stable::empty_like(x),
               mask = torch::stable::new_empty(x, {with_mask ? (a.count() + 7) / 8 : 0}, ScalarType::Byte);
  if (a.count() == 0) return {y, mask};

  dispatch(a.dtype, [&](auto type) {
    using T = decltype(type);
    const Apply<T> p{data<T>(x),
                     data<T>(residual),
                     data(scale),
                     data(shift),
                     data(residual_scale),
                     data(residual_shift),
                     out<T>(y),
                     with_mask ? out<uint8_t>(mask) : nullptr,
                     relu};
    const bool in_line = aligned({p.x, p.residual, p.y});
    dispatch(channels_kind(a, in_line), [&](auto channels) {
      const auto run = [&](auto kernel) {
        const auto [grid, walk] = make_walk(device, kernel, a, channels, in_line);
        device.launch(kernel, grid, p, walk);
      };
      adds ? run(bn_apply_kernel<T, channels, true>) : run(bn_apply_kernel<T, channels, false>);
    });
  });
  return {y, mask};
}

}  // namespace resnet_fused
