#include "max_pool.cuh"

#include "bn_backward.h"
#include "ops.h"

namespace resnet_fused {
namespace {

int64_t pooled(int64_t size) { return (size + 1) / 2; }

Pool make_pool(const Activation& a) {
  const int64_t OH = pooled(a.H), OW = pooled(a.W);
  return {a.C, a.H, a.W, OH, OW, Divider(std::max<int64_t>(OW, 1)), Divider(std::max<int64_t>(OH, 1)), a.nhwc};
}

// y and index, dense in the order of x.
Tensor empty_pooled(const Tensor& x, const Activation& a, ScalarType dtype) {
  const auto format =
      a.nhwc ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  return torch::stable::empty({a.N, a.C, pooled(a.H), pooled(a.W)}, dtype, std::nullopt, x.device(), std::nullopt,
                              format);
}

template <class Kernel>
std::tuple<unsigned, PoolWalk> make_walk(const Device& device, Kernel kernel, const Activation& a, const Pool& pool,
                                         int V) {
  const int64_t items = a.N * pool.OH * pool.OW * a.C / V, period = a.nhwc ? a.C / V : 1;
  PoolWalk walk{items, 0, Divider(a.C / V), Divider(a.C), Divider(pool.OH * pool.OW)};
  const unsigned grid = persistent_grid(device, kernel, items, period, walk.step);
  return {grid, walk};
}

struct Checked {
  Activation x;
  Pool pool;
};

Checked check(const char* op, const Tensor& dy, const Tensor& index, const Tensor& x, const Tensor& scale,
              const Tensor& shift, const Tensor& mean, const Tensor& invstd) {
  Activation a = check_activations(op, {{"x", &x}});
  STD_TORCH_CHECK(dy.dim() == 4 && dy.size(0) == a.N && dy.size(1) == a.C && dy.size(2) == pooled(a.H) &&
                      dy.size(3) == pooled(a.W) && dy.scalar_type() == a.dtype,
                  op, ": dy must have the shape [", a.N, ", ", a.C, ", ", pooled(a.H), ", ", pooled(a.W),
                  "] and the dtype of x, ", text(x), "; got ", text(dy));
  STD_TORCH_CHECK(same(index.sizes(), dy.sizes()) && index.scalar_type() == ScalarType::Byte, op,
                  ": index must be Byte and have the shape of dy, ", text(dy), "; got ", text(index));
  bool found = dy.numel() == 0;
  for (const bool nhwc : {a.nhwc, !a.nhwc}) {
    if (found || !is_dense(x, nhwc) || !is_dense(dy, nhwc) || !is_dense(index, nhwc)) continue;
    a.nhwc = nhwc;
    found = true;
  }
  STD_TORCH_CHECK(found, op, ": dy and index must be dense in the order of x, ", text(x), "; got ", text(dy), " and ",
                  text(index));
  check_backward(op, x, a.C, scale, shift, mean, invstd);
  return {a, make_pool(a)};
}

template <class T>
Backward<T> arguments(const Tensor& dy, const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& mean,
                      const Tensor& invstd) {
  return {data<T>(dy), data<T>(x), nullptr, data(scale), data(shift), data(mean), data(invstd), ReluMask::kRecompute};
}

}  // namespace

std::tuple<Tensor, Tensor> bn_act_max_pool(const Tensor& x, const Tensor& scale, const Tensor& shift) {
  const Activation a = check_activations("bn_act_max_pool", {{"x", &x}});
  check_vector("bn_act_max_pool", "scale", scale, a.C, x);
  check_vector("bn_act_max_pool", "shift", shift, a.C, x);
  const Device device(x);
  const Tensor y = empty_pooled(x, a, a.dtype), index = empty_pooled(x, a, ScalarType::Byte);
  if (a.count() == 0) return {y, index};
  const Pool pool = make_pool(a);
  dispatch(a.dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto kernel, int V) {
      const auto [grid, walk] = make_walk(device, kernel, a, pool, V);
      device.launch(kernel, grid, data<T>(x), data(scale), data(shift), out<T>(y), out<uint8_t>(index), pool, walk);
    };
    if (!a.nhwc) {
      run(bn_act_max_pool_kernel<T, 1, false>, 1);
    } else if (a.C % 8 == 0 && aligned({data<T>(x), out<T>(y)}) && aligned({out<uint8_t>(index)}, 8)) {
      run(bn_act_max_pool_kernel<T, 8, true>, 8);
    } else {
      run(bn_act_max_pool_kernel<T, 1, true>, 1);
    }
  });
  return {y, index};
}

std::tuple<Tensor, Tensor> bn_act_max_pool_backward_reduce(const Tensor& dy, const Tensor& index, const Tensor& x,
                                                           const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                                           const Tensor& invstd, int64_t rows) {
  const char* const op = "bn_act_max_pool_backward_reduce";
  const auto [a, pool] = check(op, dy, index, x, scale, shift, mean, invstd);
  check_rows(op, rows);
  const Device device(x);
  const Tensor partials = float_like(x, {2, rows, a.C});
  const int64_t windows = a.N * pool.OH * pool.OW, per_row = (windows + rows - 1) / rows;
  if (a.C > 0) {
    dispatch(a.dtype, [&, &a = a, &pool = pool](auto type) {
      using T = decltype(type);
      const auto p = arguments<T>(dy, x, scale, shift, mean, invstd);
      const auto by_pixel = [&](auto kernel, int V, int widest) {
        const Columns tiling(a.C / V, widest);
        device.launch(kernel, grid_x(op, rows * tiling.tiles), p, data<uint8_t>(index), out<float>(partials), windows,
                      per_row, static_cast<int>(rows), pool, tiling);
      };
      if (!a.nhwc) {
        device.launch(max_pool_backward_reduce_nchw<T>, grid_x(op, (rows * a.C + kWarpsPerBlock - 1) / kWarpsPerBlock),
                      p, data<uint8_t>(index), out<float>(partials), windows, per_row, rows, pool);
      } else if (a.C % 8 == 0 && aligned({p.dy, p.x}) && aligned({data<uint8_t>(index)}, 8)) {
        by_pixel(max_pool_backward_reduce_nhwc<T, 8>, 8, kWidestOctets);
      } else {
        by_pixel(max_pool_backward_reduce_nhwc<T, 1>, 1, kWidestScalars);
      }
    });
  }
  return reduce_two(device, partials);
}

Tensor bn_act_max_pool_backward_apply(const Tensor& dy, const Tensor& index, const Tensor& x, const Tensor& scale,
                                      const Tensor& shift, const Tensor& mean, const Tensor& invstd,
                                      const OptionalTensor& sum_dy, const OptionalTensor& sum_dy_xhat, double count) {
  const char* const op = "bn_act_max_pool_backward_apply";
  const auto [a, pool] = check(op, dy, index, x, scale, shift, mean, invstd);
  check_sums(op, x, a.C, sum_dy, sum_dy_xhat);
  const Device device(x);
  const Tensor dx = torch::stable::empty_like(x);
  if (a.count() == 0) return dx;
  dispatch(a.dtype, [&, &a = a, &pool = pool](auto type) {
    using T = decltype(type);
    const auto p = arguments<T>(dy, x, scale, shift, mean, invstd);
    const auto run = [&](auto kernel, int V) {
      const auto [grid, walk] = make_walk(device, kernel, a, pool, V);
      device.launch(kernel, grid, p, data<uint8_t>(index), data(sum_dy), data(sum_dy_xhat), static_cast<float>(count),
                    out<T>(dx), pool, walk);
    };
    if (!a.nhwc) {
      run(max_pool_backward_apply_kernel<T, 1, false>, 1);
    } else if (a.C % 8 == 0 && aligned({p.dy, p.x, out<T>(dx)}) && aligned({data<uint8_t>(index)}, 8)) {
      run(max_pool_backward_apply_kernel<T, 8, true>, 8);
    } else {
      run(max_pool_backward_apply_kernel<T, 1, true>, 1);
    }
  });
  return dx;
}

}  // namespace resnet_fused
