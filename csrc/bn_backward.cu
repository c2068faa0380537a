#include "bn_backward.h"

#include "ops.h"
#include "walk.h"

namespace resnet_fused {
namespace {

Activation check(const char* op, const Tensor& dy, const Tensor& x, const OptionalTensor& mask, const Tensor& scale,
                 const Tensor& shift, const Tensor& mean, const Tensor& invstd) {
  const Activation a = check_activations(op, {{"x", &x}, {"dy", &dy}});
  check_backward(op, x, a.C, scale, shift, mean, invstd);
  if (mask.has_value()) {
    STD_TORCH_CHECK(mask->dim() == 1 && mask->size(0) == (a.count() + 7) / 8 &&
                        mask->scalar_type() == ScalarType::Byte && mask->is_contiguous(),
                    op, ": mask must be contiguous Byte [", (a.count() + 7) / 8, "], one bit per element of x, got ",
                    text(*mask));
  }
  return a;
}

template <class T>
Backward<T> arguments(const Tensor& dy, const Tensor& x, const OptionalTensor& mask, const Tensor& scale,
                      const Tensor& shift, const Tensor& mean, const Tensor& invstd, bool relu) {
  const ReluMask relu_mask = !relu ? ReluMask::kNone : mask.has_value() ? ReluMask::kBits : ReluMask::kRecompute;
  return {data<T>(dy), data<T>(x), data<uint8_t>(mask), data(scale), data(shift), data(mean), data(invstd), relu_mask};
}

}  // namespace

std::tuple<Tensor, Tensor> bn_backward_reduce(const Tensor& dy, const Tensor& x, const OptionalTensor& mask,
                                              const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                              const Tensor& invstd, bool relu, int64_t rows) {
  const Activation a = check("bn_backward_reduce", dy, x, mask, scale, shift, mean, invstd);
  check_rows("bn_backward_reduce", rows);
  const Device device(x);
  const Tensor partials = float_like(x, {2, rows, a.C});
  const int64_t per_row = (a.pixels() + rows - 1) / rows, plane = std::max<int64_t>(a.H * a.W, 1);

  if (a.C > 0) {
    dispatch(a.dtype, [&](auto type) {
      using T = decltype(type);
      const auto p = arguments<T>(dy, x, mask, scale, shift, mean, invstd, relu);
      const auto by_pixel = [&](auto kernel, int V, int widest) {
        const Columns tiling(a.C / V, widest);
        device.launch(kernel, grid_x("bn_backward_reduce", rows * tiling.tiles), p, out<float>(partials), a.pixels(),
                      per_row, static_cast<int>(rows), tiling);
      };
      const auto by_plane = [&](auto kernel) {
        device.launch(kernel, grid_x("bn_backward_reduce", (rows * a.C + kWarpsPerBlock - 1) / kWarpsPerBlock), p,
                      out<float>(partials), a.pixels(), per_row, rows, a.C, Divider(plane));
      };
      const bool octets = aligned({p.dy, p.x}) && (a.nhwc ? a.C : plane) % 8 == 0;
      if (a.nhwc) {
        octets ? by_pixel(bn_backward_reduce_nhwc<T, 8>, 8, kWidestOctets)
               : by_pixel(bn_backward_reduce_nhwc<T, 1>, 1, kWidestScalars);
      } else {
        octets ? by_plane(bn_backward_reduce_nchw<T, 8>) : by_plane(bn_backward_reduce_nchw<T, 1>);
      }
    });
  }
  return reduce_two(device, partials);
}

std::tuple<Tensor, Tensor> bn_backward_apply(const Tensor& dy, const Tensor& x, const OptionalTensor& mask,
                                             const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                             const Tensor& invstd, const OptionalTensor& sum_dy,
                                             const OptionalTensor& sum_dy_xhat, double count, bool relu,
                                             bool with_dresidual) {
  const Activation a = check("bn_backward_apply", dy, x, mask, scale, shift, mean, invstd);
  check_sums("bn_backward_apply", x, a.C, sum_dy, sum_dy_xhat);
  const Device device(x);
  const Tensor dx = torch::stable::empty_like(x),
               dresidual = with_dresidual ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  if (a.count() == 0) return {dx, dresidual};

  dispatch(a.dtype, [&](auto type) {
    using T = decltype(type);
    const auto p = arguments<T>(dy, x, mask, scale, shift, mean, invstd, relu);
    T* const residual = with_dresidual ? out<T>(dresidual) : nullptr;
    const bool in_line = aligned({p.dy, p.x, out<T>(dx), residual});
    dispatch(channels_kind(a, in_line), [&](auto channels) {
      const auto kernel = bn_backward_apply_kernel<T, channels>;
      const auto [grid, walk] = make_walk(device, kernel, a, channels, in_line);
      device.launch(kernel, grid, p, data(sum_dy), data(sum_dy_xhat), static_cast<float>(count), out<T>(dx), residual,
                    walk);
    });
  });
  return {dx, dresidual};
}

}  // namespace resnet_fused
