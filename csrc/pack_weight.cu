#include "pack_weight.cuh"

#include "launch.h"
#include "ops.h"

namespace resnet_fused {

Tensor pack_weight(const Tensor& weight, bool flip) {
  STD_TORCH_CHECK(weight.dim() == 4, "pack_weight: weight must be 4-D [K, C, R, S], got ", text(weight));
  const size_t bytes = weight.element_size();
  STD_TORCH_CHECK(bytes == 2 || bytes == 4, "pack_weight: weight must have elements of 2 or 4 bytes, got ",
                  text(weight));
  const int64_t K = weight.size(0), C = weight.size(1), R = weight.size(2), S = weight.size(3);
  const Device device(weight);
  const Tensor packed =
      flip ? torch::stable::new_empty(weight, {C, R, S, K}) : torch::stable::new_empty(weight, {K, R, S, C});
  if (weight.numel() == 0) return packed;
  PackWeight p{flip ? C : K,
               R * S,
               flip ? K : C,
               weight.stride(flip ? 1 : 0),
               weight.stride(flip ? 0 : 1),
               weight.stride(2),
               weight.stride(3),
               S,
               flip,
               false};
  p.transpose = p.stride_inner != 1;
  constexpr int kTile = 32;
  const int64_t blocks = (p.outer * p.taps + kTile - 1) / kTile * ((p.inner + kTile - 1) / kTile);
  const unsigned grid = grid_x("pack_weight", blocks);
  if (bytes == 2) {
    device.launch(pack_weight_kernel<uint16_t>, grid, data<uint16_t>(weight), out<uint16_t>(packed), p);
  } else {
    device.launch(pack_weight_kernel<uint32_t>, grid, data<uint32_t>(weight), out<uint32_t>(packed), p);
  }
  return packed;
}

}  // namespace resnet_fused
