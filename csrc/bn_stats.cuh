// bn_stats: mean and sum of squared deviations of each channel over `rows` consecutive ranges of pixels.
//
// Every value is taken relative to a pivot, the first pixel of the range, so that mean/std = 1e6 costs no digits;
// within that, chunks of values that are in registers give an exact-to-rounding local mean and deviations, which are
// merged by Chan, Golub and LeVeque (1979), so that a pivot that is an outlier costs none either. The mean comes from a
// plain sum: an infinity stays an infinity, as in PyTorch.
//
// Bytes per element: one read of x.
#pragma once

#include "columns.cuh"

namespace resnet_fused {

// The number of values, their sum and sum of squared deviations, relative to a pivot.
template <int V>
struct Moments {
  float count, sum[V], m2[V];

  __device__ __forceinline__ Moments() : count(0.0f) {
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = m2[j] = 0.0f;
  }
  __device__ __forceinline__ void merge(const Moments& other) {
    if (other.count == 0.0f) return;
    // An empty side has sum 0 and no weight; its reciprocal is never infinite.
    const float total = count + other.count, inverse = 1.0f / fmaxf(count, 1.0f), inverse_other = 1.0f / other.count;
    const float weight = count * (other.count / total);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float delta = other.sum[j] * inverse_other - sum[j] * inverse;
      // A weight of zero must not turn an infinite delta into a NaN.
      m2[j] += other.m2[j] + (weight == 0.0f ? 0.0f : delta * delta * weight);
      sum[j] += other.sum[j];
    }
    count = total;
  }
};

__device__ __forceinline__ float pivot_of(float first) { return fabsf(first) <= 3.4028234e38f ? first : 0.0f; }

// In fp64, as the mean that is stored must not round away what was taken relative to the pivot.
__device__ __forceinline__ double mean_of(float pivot, float sum, float count) {
  return count == 0.0f ? 0.0 : static_cast<double>(pivot) + static_cast<double>(sum / count);
}

// The moments of the first `valid` of `kChunk` vectors that are in registers.
template <class T, int V, int kChunk>
__device__ __forceinline__ Moments<V> chunk_moments(const Vec<T, V>* loaded, int valid, const float (&pivot)[V]) {
  Moments<V> chunk;
  chunk.count = valid < kChunk ? valid : kChunk;
#pragma unroll
  for (int u = 0; u < kChunk; ++u) {
    float v[V];
    loaded[u].unpack(v);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (u < valid) chunk.sum[j] += v[j] - pivot[j];
    }
  }
  const float inverse = 1.0f / chunk.count;
#pragma unroll
  for (int u = 0; u < kChunk; ++u) {
    float v[V];
    loaded[u].unpack(v);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float d = v[j] - pivot[j] - chunk.sum[j] * inverse;
      if (u < valid) chunk.m2[j] += d * d;
    }
  }
  return chunk;
}

// x [M, C]; mean, m2 [rows, C]; count [rows]. A block owns one range of `per_row` pixels and one tile of channels.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    bn_stats_nhwc(const T* __restrict__ x, double* __restrict__ mean, float* __restrict__ m2, float* __restrict__ count,
                  int64_t pixels, int64_t per_row, int rows, Columns tiling) {
  constexpr int kChunk = V == 8 ? 4 : 8, kGroups = V == 8 && sizeof(T) == 2 ? 2 : 1;
  const int64_t C = tiling.vectors * V;
  const int64_t row = rows - 1 - blockIdx.x / tiling.tiles;  // backwards: the producer of x wrote its end last
  const Place at(tiling, blockIdx.x % tiling.tiles);
  const int64_t begin = row * per_row < pixels ? row * per_row : pixels;
  const int64_t end = begin + per_row < pixels ? begin + per_row : pixels;
  const T* const column = x + at.vector * V;

  Moments<V> moments;
  float pivot[V];
#pragma unroll
  for (int j = 0; j < V; ++j) pivot[j] = 0.0f;
  if (at.active && begin < end) {
    Vec<T, V>::load(column + begin * C).unpack(pivot);
#pragma unroll
    for (int j = 0; j < V; ++j) pivot[j] = pivot_of(pivot[j]);
    for (int64_t p = begin + at.lane; p < end; p += kGroups * kChunk * tiling.lanes) {
      Vec<T, V> loaded[kGroups * kChunk];
      int valid = 0;
#pragma unroll
      for (int u = 0; u < kGroups * kChunk; ++u) {
        if (p + u * tiling.lanes < end) {
          loaded[u] = Vec<T, V>::load(column + (p + u * tiling.lanes) * C);
          valid = u + 1;
        }
      }
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        if (g * kChunk < valid)
          moments.merge(chunk_moments<T, V, kChunk>(loaded + g * kChunk, valid - g * kChunk, pivot));
      }
    }
  }
  merge_lanes(moments, tiling.columns, at.lane, tiling.lanes);
  if (!at.active || at.lane != 0) return;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    mean[row * C + at.vector * V + j] = mean_of(pivot[j], moments.sum[j], moments.count);
    m2[row * C + at.vector * V + j] = moments.m2[j];
  }
  if (at.vector == 0) count[row] = moments.count;
}

// x [N, C, HW] as planes; the rest as above. A warp owns one range of pixels of one channel.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    bn_stats_nchw(const T* __restrict__ x, double* __restrict__ mean, float* __restrict__ m2, float* __restrict__ count,
                  int64_t pixels, int64_t per_row, int64_t rows, int64_t C, Divider plane) {
  const int64_t item = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (item >= rows * C) return;
  const int64_t row = item / C, c = item - row * C;
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = row * per_row < pixels ? row * per_row : pixels;
  const int64_t end = begin + per_row < pixels ? begin + per_row : pixels;
  const auto offset = [&](int64_t pixel) {
    const int64_t n = plane.quotient(pixel);
    return (n * C + c) * plane.d + (pixel - n * plane.d);
  };

  Moments<1> moments;
  const float pivot = begin < end ? pivot_of(widened(x[offset(begin)])) : 0.0f;
  // A chunk is eight values of the channel: an octet of neighbours, whose ends may lie outside of the range, or eight
  // pixels a warp apart.
  constexpr int kStep = V == 8 ? 1 : kWarp;
  for (int64_t p = (V == 8 ? begin / 8 * 8 : begin) + lane * V; p < end; p += 8 * kWarp) {
    float v[8];
    if constexpr (V == 8) {
      Vec<T, 8>::load(x + offset(p)).unpack(v);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = p + j * kStep < end ? widened(x[offset(p + j * kStep)]) : 0.0f;
    }
    Moments<1> chunk;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const bool inside = p + j * kStep >= begin && p + j * kStep < end;
      chunk.count += inside ? 1.0f : 0.0f;
      if (inside) chunk.sum[0] += v[j] - pivot;
    }
    const float local = chunk.sum[0] / chunk.count;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float d = v[j] - pivot - local;
      if (p + j * kStep >= begin && p + j * kStep < end) chunk.m2[0] += d * d;
    }
    moments.merge(chunk);
  }
  merge_warp(moments);
  if (lane != 0) return;
  mean[item] = mean_of(pivot, moments.sum[0], moments.count);
  m2[item] = moments.m2[0];
  if (c == 0) count[row] = moments.count;
}

}  // namespace resnet_fused
