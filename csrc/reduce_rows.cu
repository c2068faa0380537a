#include "reduce_rows.cuh"

#include "bn_backward.h"
#include "ops.h"

namespace resnet_fused {
namespace {

// `matrices` of [rows, inner] in `partials`, to one vector each.
template <class T>
void reduce(const Device& device, const Tensor& partials, unsigned matrices, int64_t rows, int64_t inner, T* out0,
            T* out1) {
  if (inner == 0) return;
  const bool octets = inner % 8 == 0 && aligned({data<T>(partials), out0, out1});
  // Few rows leave lanes idle: then a block is wide and has one.
  const int widest = rows < 16 ? kThreads : octets ? kWidestOctets : kWidestScalars;
  const Columns tiling(octets ? inner / 8 : inner, widest);
  device.launch(octets ? reduce_rows_kernel<T, 8> : reduce_rows_kernel<T, 1>,
                dim3(grid_x("reduce_rows", tiling.tiles), matrices), data<T>(partials), out0, out1, rows, tiling);
}

}  // namespace

std::tuple<Tensor, Tensor> reduce_two(const Device& device, const Tensor& partials) {
  const int64_t rows = partials.size(1), C = partials.size(2);
  const Tensor first = float_like(partials, {C}), second = float_like(partials, {C});
  reduce(device, partials, 2, rows, C, out<float>(first), out<float>(second));
  return {first, second};
}

Tensor reduce_rows(const Tensor& partials) {
  const ScalarType dtype = partials.scalar_type();
  STD_TORCH_CHECK(partials.dim() >= 1 && partials.is_contiguous(),
                  "reduce_rows: partials must be contiguous [rows, ...], got ", text(partials));
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                  "reduce_rows: partials must be Float, Half or BFloat16, got ", text(partials));
  const Device device(partials);
  const auto sizes = partials.sizes();
  const Tensor sum = torch::stable::new_empty(partials, {sizes.data() + 1, sizes.size() - 1});
  dispatch(dtype, [&](auto type) {
    using T = decltype(type);
    reduce<T>(device, partials, 1, partials.size(0), sum.numel(), out<T>(sum), out<T>(sum));
  });
  return sum;
}

}  // namespace resnet_fused
