// pack_weight: a [K, C, R, S] weight of any strides as contiguous [K, R, S, C]; flipped, for dgrad, as [C, R, S, K]
// with r and s reversed.
//
// Seen as out[a][t][b] = weight[...], a and b are K and C in either order and t is a tap. A block moves a 32 x 32 tile
// of (a or b, the fast dimension of the input) x (b, the fast dimension of the output) through shared memory, so that
// both sides are read and written in runs. Elements are moved as bits. Bytes per element: one read, one write.
#pragma once

#include "device.cuh"

namespace resnet_fused {

struct PackWeight {
  int64_t outer, taps, inner;          // the output is [outer, taps, inner]
  int64_t stride_outer, stride_inner;  // of the input, in elements
  int64_t stride_r, stride_s, S;
  bool flip;
  // Threads run along `inner` when the input does too, else along the joint index outer * taps + tap, on which a KCRS
  // weight is dense.
  bool transpose;
};

// The place in the input of the element (outer, tap, 0) of the output, or its tap's mirror image.
__device__ __forceinline__ int64_t source_of(const PackWeight& p, int64_t joint) {
  const int64_t outer = joint / p.taps;
  int64_t tap = joint - outer * p.taps;
  if (p.flip) tap = p.taps - 1 - tap;
  const int64_t r = tap / p.S;
  return outer * p.stride_outer + r * p.stride_r + (tap - r * p.S) * p.stride_s;
}

template <class Bits>
__global__ void __launch_bounds__(kThreads)
    pack_weight_kernel(const Bits* __restrict__ weight, Bits* __restrict__ out, PackWeight p) {
  constexpr int kTile = 32, kStride = kThreads / kTile;
  SHARED_ARRAY(Bits, tile, kTile * (kTile + 1));  // one column more: both directions without bank conflicts
  const int64_t joints = p.outer * p.taps, across = (p.inner + kTile - 1) / kTile;
  const int64_t joint0 = int64_t(blockIdx.x) / across * kTile, inner0 = int64_t(blockIdx.x) % across * kTile;
  const int x = threadIdx.x % kTile, y0 = threadIdx.x / kTile;
#pragma unroll
  for (int i = 0; i < kTile; i += kStride) {
    const int y = y0 + i;
    const int j = p.transpose ? x : y, c = p.transpose ? y : x;
    if (joint0 + j < joints && inner0 + c < p.inner)
      tile[j * (kTile + 1) + c] = weight[source_of(p, joint0 + j) + (inner0 + c) * p.stride_inner];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kTile; i += kStride) {
    const int j = y0 + i;
    if (joint0 + j < joints && inner0 + x < p.inner)
      out[(joint0 + j) * p.inner + inner0 + x] = tile[j * (kTile + 1) + x];
  }
}

}  // namespace resnet_fused
