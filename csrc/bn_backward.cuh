// The backward of batch norm (+ residual) (+ ReLU), with dz = relu mask ? dy : 0:
//
//     bn_backward_reduce:  sum_dy = sum(dz)        sum_dy_xhat = sum(dz (x - mean) invstd)
//     bn_backward_apply:   dx = scale (dz - sum_dy / count - (x - mean) invstd sum_dy_xhat / count)        dresidual =
//     dz
//
// dy, x, dx, dresidual share one dense layout; per-channel vectors are fp32 [C]; mask is the bit mask of bn_apply.
// Bytes per element: reduce reads dy and x (+ 1/8); apply reads dy and x (+ 1/8), writes dx (+ dresidual).
#pragma once

#include "columns.cuh"
#include "elementwise.cuh"

namespace resnet_fused {

// How ReLU's mask is known: not at all, from bits, or from x by the arithmetic of bn_apply.
enum class ReluMask : int { kNone, kBits, kRecompute };

template <class T>
struct Backward {
  const T *dy, *x;
  const uint8_t* mask;
  const float *scale, *shift, *mean, *invstd;
  ReluMask relu_mask;
};

// Zeroes dz[j] where ReLU's mask is 0, a true select: there a NaN gradient is dropped.
template <class T, int V>
__device__ __forceinline__ void apply_relu_mask(float (&dz)[V], ReluMask kind, unsigned bits, const float (&x)[V],
                                                const float (&scale)[V], const float (&shift)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const bool passed = kind == ReluMask::kNone ||
                        (kind == ReluMask::kBits ? (bits >> j & 1) != 0
                                                 : passes<T>(__fmaf_rn(x[j], scale[j], shift[j])));
    if (!passed) dz[j] = 0.0f;
  }
}

// The V mask bits from element i on; V is 1 or i is a multiple of 8.
template <int V>
__device__ __forceinline__ unsigned mask_bits(const uint8_t* __restrict__ mask, int64_t i) {
  return static_cast<unsigned>(__ldg(mask + i / 8)) >> (V == 1 ? i % 8 : 0);
}

template <int V>
__device__ __forceinline__ void load_vector(float (&out)[V], const float* __restrict__ vector, int64_t c, bool active) {
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] = active ? __ldg(vector + c + j) : 0.0f;
}

// dy, x [M, C]; partials [2, rows, C]. A block owns one range of `per_row` pixels and one tile of channels.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    bn_backward_reduce_nhwc(Backward<T> p, float* __restrict__ partials, int64_t pixels, int64_t per_row, int rows,
                            Columns tiling) {
  constexpr int kUnroll = kInFlight<T, V>;
  const int64_t C = tiling.vectors * V;
  const int64_t row = rows - 1 - blockIdx.x / tiling.tiles;  // backwards: the producer of dy wrote its end last
  const Place at(tiling, blockIdx.x % tiling.tiles);
  const int64_t begin = row * per_row, end = begin + per_row < pixels ? begin + per_row : pixels;
  const int64_t channel = at.vector * V;

  Sums<V> sums;
  float scale[V], shift[V], mean[V];
  load_vector(scale, p.scale, channel, at.active);
  load_vector(shift, p.shift, channel, at.active);
  load_vector(mean, p.mean, channel, at.active);
  if (at.active) {
    for (int64_t pixel = begin + at.lane; pixel < end; pixel += kUnroll * tiling.lanes) {
      Vec<T, V> dy[kUnroll], x[kUnroll];
      unsigned bits[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (pixel + u * tiling.lanes >= end) continue;
        const int64_t i = (pixel + u * tiling.lanes) * C + channel;
        dy[u] = Vec<T, V>::load(p.dy + i);
        x[u] = Vec<T, V>::load(p.x + i);
        bits[u] = p.relu_mask == ReluMask::kBits ? mask_bits<V>(p.mask, i) : 0;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (pixel + u * tiling.lanes >= end) continue;
        float dz[V], v[V];
        dy[u].unpack(dz);
        x[u].unpack(v);
        apply_relu_mask<T>(dz, p.relu_mask, bits[u], v, scale, shift);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          sums.first[j] += dz[j];
          sums.second[j] += dz[j] * (v[j] - mean[j]);
        }
      }
    }
  }
  merge_lanes(sums, tiling.columns, at.lane, tiling.lanes);
  if (!at.active || at.lane != 0) return;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    partials[row * C + channel + j] = sums.first[j];
    partials[(rows + row) * C + channel + j] = sums.second[j] * p.invstd[channel + j];
  }
}

// dy, x [N, C, HW] as planes; the rest as above. A warp owns one range of pixels of one channel.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    bn_backward_reduce_nchw(Backward<T> p, float* __restrict__ partials, int64_t pixels, int64_t per_row, int64_t rows,
                            int64_t C, Divider plane) {
  constexpr int kUnroll = kInFlight<T, V>;
  const int64_t item = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (item >= rows * C) return;
  const int64_t row = item / C, c = item - row * C;
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = row * per_row, end = begin + per_row < pixels ? begin + per_row : pixels;
  float scale[V], shift[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    scale[j] = p.scale[c];
    shift[j] = p.shift[c];
  }
  const float mean = p.mean[c];

  Sums<1> sums;
  // Octets start at multiples of eight; those at the ends of the range may lie partly outside of it.
  for (int64_t pixel = begin / V * V + lane * V; pixel < end; pixel += kUnroll * kWarp * V) {
    Vec<T, V> dy[kUnroll], x[kUnroll];
    unsigned bits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = pixel + u * kWarp * V;
      if (at >= end) continue;
      const int64_t n = plane.quotient(at), i = (n * C + c) * plane.d + (at - n * plane.d);
      dy[u] = Vec<T, V>::load(p.dy + i);
      x[u] = Vec<T, V>::load(p.x + i);
      bits[u] = p.relu_mask == ReluMask::kBits ? mask_bits<V>(p.mask, i) : 0;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = pixel + u * kWarp * V;
      if (at >= end) continue;
      float dz[V], v[V];
      dy[u].unpack(dz);
      x[u].unpack(v);
      apply_relu_mask<T>(dz, p.relu_mask, bits[u], v, scale, shift);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (at + j < begin || at + j >= end) continue;
        sums.first[0] += dz[j];
        sums.second[0] += dz[j] * (v[j] - mean);
      }
    }
  }
  merge_warp(sums);
  if (lane != 0) return;
  partials[item] = sums.first[0];
  partials[rows * C + item] = sums.second[0] * p.invstd[c];
}

// A thread owns octets of memory, a whole step apart (elementwise.cuh).
template <class T, Channels kChannels>
__global__ void __launch_bounds__(kThreads)
    bn_backward_apply_kernel(Backward<T> p, const float* __restrict__ sum_dy, const float* __restrict__ sum_dy_xhat,
                             float count, T* __restrict__ dx, T* __restrict__ dresidual, Walk walk) {
  constexpr int kUnroll = kChannels == Channels::kEach ? 1 : kInFlight<T, 8>;
  int64_t octet = walk.first();
  if (octet >= walk.octets) return;
  const bool batch = sum_dy != nullptr, reads_x = batch || p.relu_mask == ReluMask::kRecompute;
  float scale[8], shift[8], mean[8], slope[8], offset[8];  // dx = scale dz + slope (x - mean) + offset
  const auto parameters = [&](int64_t o) {
    int64_t c[8];
    walk.template channels_of<kChannels>(o, c);
    gather(scale, p.scale, c, 1.0f);
    gather(shift, p.relu_mask == ReluMask::kRecompute ? p.shift : nullptr, c, 0.0f);
    gather(mean, batch ? p.mean : nullptr, c, 0.0f);
    gather(slope, batch ? p.invstd : nullptr, c, 0.0f);
    gather(offset, sum_dy, c, 0.0f);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      slope[j] *= batch ? -scale[j] * (__ldg(sum_dy_xhat + c[j]) / count) : 0.0f;
      offset[j] *= -scale[j] / count;
    }
  };
  if constexpr (kChannels == Channels::kOctet) parameters(octet);

  for (; octet < walk.octets; octet += kUnroll * walk.step) {
    Vec<T, 8> dy[kUnroll], x[kUnroll];
    unsigned bits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t o = octet + u * walk.step;
      if (o >= walk.octets) continue;
      if constexpr (kChannels == Channels::kEach) {
        dy[u] = load_octet(p.dy, 8 * o, walk.count, walk.aligned);
        x[u] = load_octet(p.x, 8 * o, reads_x ? walk.count : 0, walk.aligned);
      } else {
        dy[u] = Vec<T, 8>::load(p.dy + 8 * o);
        if (reads_x) x[u] = Vec<T, 8>::load(p.x + 8 * o);
      }
      bits[u] = p.relu_mask == ReluMask::kBits ? mask_bits<8>(p.mask, 8 * o) : 0;
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t o = octet + u * walk.step;
      if (o >= walk.octets) continue;
      if constexpr (kChannels != Channels::kOctet) parameters(o);
      float dz[8], v[8];
      dy[u].unpack(dz);
      x[u].unpack(v);
      apply_relu_mask<T>(dz, p.relu_mask, bits[u], v, scale, shift);
      if (dresidual != nullptr) {
        if constexpr (kChannels == Channels::kEach) {
          store_octet(dresidual, 8 * o, walk.count, walk.aligned, dz);
        } else {
          Vec<T, 8>::pack(dz).store(dresidual + 8 * o);
        }
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        // Constants have no gradient through the statistics: x is not read, not even multiplied by zero.
        const float through_statistics = batch ? __fmaf_rn(slope[j], v[j] - mean[j], offset[j]) : 0.0f;
        dz[j] = __fmaf_rn(scale[j], dz[j], through_statistics);
      }
      if constexpr (kChannels == Channels::kEach) {
        store_octet(dx, 8 * o, walk.count, walk.aligned, dz);
      } else {
        Vec<T, 8>::pack(dz).store(dx + 8 * o);
      }
    }
  }
}

}  // namespace resnet_fused
