#include "bn_stats.cuh"

#include "launch.h"
#include "ops.h"

namespace resnet_fused {

std::tuple<Tensor, Tensor, Tensor> bn_stats(const Tensor& x, int64_t rows) {
  const Activation a = check_activations("bn_stats", {{"x", &x}});
  STD_TORCH_CHECK(a.C > 0, "bn_stats: x must have at least one channel, got ", text(x));
  check_rows("bn_stats", rows);
  const Device device(x);
  const Tensor mean = torch::stable::new_empty(x, {rows, a.C}, ScalarType::Double), m2 = float_like(x, {rows, a.C}),
               count = float_like(x, {rows});
  const int64_t per_row = (a.pixels() + rows - 1) / rows, plane = std::max<int64_t>(a.H * a.W, 1);

  dispatch(a.dtype, [&](auto type) {
    using T = decltype(type);
    const auto by_pixel = [&](auto kernel, int V, int widest) {
      const Columns tiling(a.C / V, widest);
      device.launch(kernel, grid_x("bn_stats", rows * tiling.tiles), data<T>(x), out<double>(mean), out<float>(m2),
                    out<float>(count), a.pixels(), per_row, static_cast<int>(rows), tiling);
    };
    const auto by_plane = [&](auto kernel) {
      device.launch(kernel, grid_x("bn_stats", (rows * a.C + kWarpsPerBlock - 1) / kWarpsPerBlock), data<T>(x),
                    out<double>(mean), out<float>(m2), out<float>(count), a.pixels(), per_row, rows, a.C,
                    Divider(plane));
    };
    const bool octets = aligned({data<T>(x)}) && (a.nhwc ? a.C : plane) % 8 == 0;
    if (a.nhwc) {
      octets ? by_pixel(bn_stats_nhwc<T, 8>, 8, kWidestOctets) : by_pixel(bn_stats_nhwc<T, 1>, 1, kWidestScalars);
    } else {
      octets ? by_plane(bn_stats_nchw<T, 8>) : by_plane(bn_stats_nchw<T, 1>);
    }
  });
  return {mean, m2, count};
}

}  // namespace resnet_fused
