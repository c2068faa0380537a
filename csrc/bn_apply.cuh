// bn_apply: y = round(act(x scale + shift + (residual_scale residual + residual_shift))), and on request one bit per
// element: not (y <= 0).
//
// x, residual and y share one dense layout (NHWC or NCHW); scale and shift are fp32 [C]; mask is uint8 [ceil(count /
// 8)]. Bytes per element: read x (+ residual), write y (+ 1/8). A thread owns octets of memory, a whole step apart
// (elementwise.cuh).
#pragma once

#include "elementwise.cuh"

namespace resnet_fused {

template <class T>
struct Apply {
  const T *x, *residual;
  const float *scale, *shift, *residual_scale, *residual_shift;
  T* y;
  uint8_t* mask;
  bool relu;
};

template <class T, Channels kChannels, bool kResidual>
__global__ void __launch_bounds__(kThreads) bn_apply_kernel(Apply<T> p, Walk walk) {
  constexpr int kUnroll = kChannels == Channels::kEach ? 1 : kInFlight<T, 8>;
  int64_t octet = walk.first();
  if (octet >= walk.octets) return;
  float scale[8], shift[8], residual_scale[8], residual_shift[8];
  const auto parameters = [&](int64_t o) {
    int64_t c[8];
    walk.template channels_of<kChannels>(o, c);
    gather(scale, p.scale, c, 1.0f);
    gather(shift, p.shift, c, 0.0f);
    if constexpr (kResidual) {
      gather(residual_scale, p.residual_scale, c, 1.0f);
      gather(residual_shift, p.residual_shift, c, 0.0f);
    }
  };
  if constexpr (kChannels == Channels::kOctet) parameters(octet);

  for (; octet < walk.octets; octet += kUnroll * walk.step) {
    Vec<T, 8> x[kUnroll], residual[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t o = octet + u * walk.step;
      if (o >= walk.octets) continue;
      if constexpr (kChannels == Channels::kEach) {
        x[u] = load_octet(p.x, 8 * o, walk.count, walk.aligned);
        if constexpr (kResidual) residual[u] = load_octet(p.residual, 8 * o, walk.count, walk.aligned);
      } else {
        x[u] = Vec<T, 8>::load(p.x + 8 * o);
        if constexpr (kResidual) residual[u] = Vec<T, 8>::load(p.residual + 8 * o);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t o = octet + u * walk.step;
      if (o >= walk.octets) continue;
      if constexpr (kChannels != Channels::kOctet) parameters(o);
      float v[8], r[8];
      x[u].unpack(v);
      if constexpr (kResidual) residual[u].unpack(r);
      unsigned bits = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        v[j] = __fmaf_rn(v[j], scale[j], shift[j]);
        if constexpr (kResidual) v[j] += __fmaf_rn(r[j], residual_scale[j], residual_shift[j]);
        const bool pass = passes<T>(v[j]);
        bits |= unsigned(pass) << j;
        if (p.relu && !pass) v[j] = 0.0f;
      }
      if constexpr (kChannels == Channels::kEach) {
        store_octet(p.y, 8 * o, walk.count, walk.aligned, v);
        if (8 * o + 8 > walk.count) bits &= (1u << (walk.count - 8 * o)) - 1;
      } else {
        Vec<T, 8>::pack(v).store(p.y + 8 * o);
      }
      if (p.mask != nullptr) p.mask[o] = static_cast<uint8_t>(bits);
    }
  }
}

}  // namespace resnet_fused
