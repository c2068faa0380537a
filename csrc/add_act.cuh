// add_act: y = round(act(x + other)). add_act_backward: dz = not (y <= 0) ? dy : 0, the gradient of both summands.
//
// All tensors share one dense layout, which does not matter here. Bytes per element: two reads, one write. A thread
// owns octets of memory, a whole step apart; a base that is not 16-byte aligned, or the last few elements, go one by
// one.
#pragma once

#include "elementwise.cuh"

namespace resnet_fused {

template <class T, class F>
__device__ __forceinline__ void combine(const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out,
                                        const Walk& walk, F f) {
  constexpr int kUnroll = kInFlight<T, 8>;
  for (int64_t octet = walk.first(); octet < walk.octets; octet += kUnroll * walk.step) {
    Vec<T, 8> left[kUnroll], right[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = 8 * (octet + u * walk.step);
      if (i >= walk.count) continue;
      left[u] = load_octet(a, i, walk.count, walk.aligned);
      right[u] = load_octet(b, i, walk.count, walk.aligned);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = 8 * (octet + u * walk.step);
      if (i >= walk.count) continue;
      float x[8], y[8];
      left[u].unpack(x);
      right[u].unpack(y);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = f(x[j], y[j]);
      store_octet(out, i, walk.count, walk.aligned, x);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_act_kernel(const T* __restrict__ x, const T* __restrict__ other, T* __restrict__ y, bool relu, Walk walk) {
  combine(x, other, y, walk, [relu](float a, float b) {
    const float sum = a + b;
    return relu && !passes<T>(sum) ? 0.0f : sum;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_act_backward_kernel(const T* __restrict__ dy, const T* __restrict__ y, T* __restrict__ dz, Walk walk) {
  combine(dy, y, dz, walk, [](float gradient, float value) { return value <= 0.0f ? 0.0f : gradient; });
}

}  // namespace resnet_fused
