// The stem: 3x3, stride 2, padding 1 max pool of relu(x scale + shift), and its backward through batch norm.
//
// x, dx [N, C, H, W]; y, dy, index [N, C, OH, OW], OH = (H + 1) / 2, OW = (W + 1) / 2, all NHWC or all NCHW;
// per-channel vectors fp32 [C]; index uint8: the winner's place 3 r + s in its window.
#pragma once

#include "bn_backward.cuh"

namespace resnet_fused {

struct Pool {
  int64_t C, H, W, OH, OW;
  Divider by_OW, by_OH;
  bool nhwc;

  // A window by its number, and the patch of x whose pixels it covers first: rows 2a and 2a+1, columns 2b and 2b+1.
  struct Window {
    int64_t n;
    int a, b;
  };
  __device__ __forceinline__ Window window(int64_t number) const {
    const int64_t line = by_OW.quotient(number), n = by_OH.quotient(line);
    return {n, static_cast<int>(line - n * OH), static_cast<int>(number - line * OW)};
  }
  __device__ __forceinline__ int64_t input(int64_t n, int64_t h, int64_t w, int64_t c) const {
    return nhwc ? ((n * H + h) * W + w) * C + c : ((n * C + c) * H + h) * W + w;
  }
  __device__ __forceinline__ int64_t output(int64_t n, int64_t a, int64_t b, int64_t c) const {
    return nhwc ? ((n * OH + a) * OW + b) * C + c : ((n * C + c) * OH + a) * OW + b;
  }
};

// How a flat grid covers windows x channels: in memory order of the output, `step` vectors apart, so that in NHWC a
// thread keeps its channels.
struct PoolWalk {
  int64_t items, step;
  Divider channel_vectors, channels, windows_per_image;
};

struct PoolItem {
  int64_t window, c;
};

template <int V, bool kNhwc>
__device__ __forceinline__ PoolItem pool_item(const PoolWalk& walk, int64_t item) {
  if constexpr (kNhwc) {
    const int64_t window = walk.channel_vectors.quotient(item);
    return {window, (item - window * walk.channel_vectors.d) * V};
  } else {
    const int64_t plane = walk.windows_per_image.quotient(item), n = walk.channels.quotient(plane);
    return {n * walk.windows_per_image.d + item - plane * walk.windows_per_image.d, plane - n * walk.channels.d};
  }
}

// 8 or 1 bytes of index.
template <int V>
struct Bytes {
  unsigned word[(V + 3) / 4];

  static __device__ __forceinline__ Bytes load(const uint8_t* __restrict__ from) {
    Bytes b;
    if constexpr (V == 8) {
      const uint2 both = __ldg(reinterpret_cast<const uint2*>(from));
      b.word[0] = both.x;
      b.word[1] = both.y;
    } else {
      b.word[0] = __ldg(from);
    }
    return b;
  }
  __device__ __forceinline__ void store(uint8_t* to) const {
    if constexpr (V == 8) {
      *reinterpret_cast<uint2*>(to) = {word[0], word[1]};
    } else {
      *to = static_cast<uint8_t>(word[0]);
    }
  }
  __device__ __forceinline__ int get(int j) const { return word[j / 4] >> (8 * (j % 4)) & 0xff; }
  __device__ __forceinline__ void set(int j, int value) {
    word[j / 4] = (word[j / 4] & ~(0xffu << (8 * (j % 4)))) | static_cast<unsigned>(value) << (8 * (j % 4));
  }
};

// A thread owns V channels of one output pixel and has its nine inputs in flight; of these, five or more come from the
// caches. Bytes per element of x: one read, 1/4 write of y, 1/4 byte of index.
template <class T, int V, bool kNhwc>
__global__ void __launch_bounds__(kThreads, 2)
    bn_act_max_pool_kernel(const T* __restrict__ x, const float* __restrict__ scale, const float* __restrict__ shift,
                           T* __restrict__ y, uint8_t* __restrict__ index, Pool pool, PoolWalk walk) {
  int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= walk.step || item >= walk.items) return;
  float a[V], b[V];
  const auto parameters = [&](int64_t c) {
    load_vector(a, scale, c, true);
    load_vector(b, shift, c, true);
  };
  if constexpr (kNhwc) parameters(pool_item<V, kNhwc>(walk, item).c);

  for (; item < walk.items; item += walk.step) {
    const PoolItem at = pool_item<V, kNhwc>(walk, item);
    const Pool::Window w = pool.window(at.window);
    if constexpr (!kNhwc) parameters(at.c);
    Vec<T, V> loaded[9];
#pragma unroll
    for (int i = 0; i < 9; ++i) {
      const int64_t h = 2 * w.a - 1 + i / 3, v = 2 * w.b - 1 + i % 3;
      if (h >= 0 && h < pool.H && v >= 0 && v < pool.W) loaded[i] = Vec<T, V>::load(x + pool.input(w.n, h, v, at.c));
    }
    float best[V];
    Bytes<V> winner{};
#pragma unroll
    for (int j = 0; j < V; ++j) best[j] = -1.0f;  // below every ReLU
#pragma unroll
    for (int i = 0; i < 9; ++i) {
      const int64_t h = 2 * w.a - 1 + i / 3, v = 2 * w.b - 1 + i % 3;
      if (!(h >= 0 && h < pool.H && v >= 0 && v < pool.W)) continue;
      float value[V];
      loaded[i].unpack(value);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        value[j] = __fmaf_rn(value[j], a[j], b[j]);
        if (value[j] <= 0.0f) value[j] = 0.0f;
      }
      Vec<T, V>::pack(value).unpack(value);  // compared as rounded
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (value[j] > best[j] || value[j] != value[j]) {  // the first of equals, but the last NaN
          best[j] = value[j];
          winner.set(j, i);
        }
      }
    }
    const int64_t out = pool.output(w.n, w.a, w.b, at.c);
    Vec<T, V>::pack(best).store(y + out);
    winner.store(index + out);
  }
}

// The four pixels of x that a window covers first, and the gradients of the four windows that reach them.
template <class T, int V>
struct Patch {
  Vec<T, V> x[4], dy[4];
  Bytes<V> index[4];

  __device__ __forceinline__ void load(const Backward<T>& p, const uint8_t* __restrict__ places, const Pool& pool,
                                       const Pool::Window& w, int64_t c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t h = 2 * w.a + i / 2, v = 2 * w.b + i % 2, a = w.a + i / 2, b = w.b + i % 2;
      if (h < pool.H && v < pool.W) x[i] = Vec<T, V>::load(p.x + pool.input(w.n, h, v, c));
      if (a < pool.OH && b < pool.OW) {
        const int64_t at = pool.output(w.n, a, b, c);
        dy[i] = Vec<T, V>::load(p.dy + at);
        index[i] = Bytes<V>::load(places + at);
      }
    }
  }

  // dz of pixel i (row i / 2, column i % 2): the sum over the windows that it won. `inside(k)`: whether window k
  // exists.
  template <int i>
  __device__ __forceinline__ void gradient(float (&dz)[V], const Pool& pool, const Pool::Window& w) const {
#pragma unroll
    for (int j = 0; j < V; ++j) dz[j] = 0.0f;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      // Window (k / 2, k % 2) sees row i / 2 at r = 1 + i / 2 - 2 (k / 2), and columns alike: an even row is seen by
      // the first window only.
      const int r = 1 + i / 2 - 2 * (k / 2), s = 1 + i % 2 - 2 * (k % 2);
      if (r < 0 || s < 0) continue;
      if (w.a + k / 2 >= pool.OH || w.b + k % 2 >= pool.OW) continue;
      float g[V];
      dy[k].unpack(g);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (index[k].get(j) == 3 * r + s) dz[j] += g[j];
      }
    }
  }

  // Calls f(pixel, dz, x) for the pixels that exist; `dz` is behind ReLU's mask.
  template <class F>
  __device__ __forceinline__ void for_each(const Pool& pool, const Pool::Window& w, const float (&scale)[V],
                                           const float (&shift)[V], F f) const {
    visit<0>(pool, w, scale, shift, f);
    visit<1>(pool, w, scale, shift, f);
    visit<2>(pool, w, scale, shift, f);
    visit<3>(pool, w, scale, shift, f);
  }

 private:
  template <int i, class F>
  __device__ __forceinline__ void visit(const Pool& pool, const Pool::Window& w, const float (&scale)[V],
                                        const float (&shift)[V], F& f) const {
    if (2 * w.a + i / 2 >= pool.H || 2 * w.b + i % 2 >= pool.W) return;
    float dz[V], v[V];
    gradient<i>(dz, pool, w);
    x[i].unpack(v);
    apply_relu_mask<T>(dz, ReluMask::kRecompute, 0, v, scale, shift);
    f(i, dz, v);
  }
};

// Bytes per element of x: one read, 1/4 read of dy, 1/4 byte of index. Blocks and partials as in bn_backward_reduce,
// over windows for pixels.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, V == 8 ? 1 : 2)
    max_pool_backward_reduce_nhwc(Backward<T> p, const uint8_t* __restrict__ index, float* __restrict__ partials,
                                  int64_t windows, int64_t per_row, int rows, Pool pool, Columns tiling) {
  const int64_t row = rows - 1 - blockIdx.x / tiling.tiles;
  const Place at(tiling, blockIdx.x % tiling.tiles);
  const int64_t begin = row * per_row, end = begin + per_row < windows ? begin + per_row : windows;
  const int64_t c = at.vector * V;
  Sums<V> sums;
  float scale[V], shift[V], mean[V];
  load_vector(scale, p.scale, c, at.active);
  load_vector(shift, p.shift, c, at.active);
  load_vector(mean, p.mean, c, at.active);
  if (at.active) {
    for (int64_t number = begin + at.lane; number < end; number += tiling.lanes) {
      const Pool::Window w = pool.window(number);
      Patch<T, V> patch;
      patch.load(p, index, pool, w, c);
      patch.for_each(pool, w, scale, shift, [&](int, const float (&dz)[V], const float (&v)[V]) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          sums.first[j] += dz[j];
          sums.second[j] += dz[j] * (v[j] - mean[j]);
        }
      });
    }
  }
  merge_lanes(sums, tiling.columns, at.lane, tiling.lanes);
  if (!at.active || at.lane != 0) return;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    partials[row * pool.C + c + j] = sums.first[j];
    partials[(rows + row) * pool.C + c + j] = sums.second[j] * p.invstd[c + j];
  }
}

// A warp owns one range of windows of one channel.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    max_pool_backward_reduce_nchw(Backward<T> p, const uint8_t* __restrict__ index, float* __restrict__ partials,
                                  int64_t windows, int64_t per_row, int64_t rows, Pool pool) {
  const int64_t item = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (item >= rows * pool.C) return;
  const int64_t row = item / pool.C, c = item - row * pool.C;
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = row * per_row, end = begin + per_row < windows ? begin + per_row : windows;
  const float scale[1] = {p.scale[c]}, shift[1] = {p.shift[c]}, mean = p.mean[c];
  Sums<1> sums;
  for (int64_t number = begin + lane; number < end; number += kWarp) {
    const Pool::Window w = pool.window(number);
    Patch<T, 1> patch;
    patch.load(p, index, pool, w, c);
    patch.for_each(pool, w, scale, shift, [&](int, const float (&dz)[1], const float (&v)[1]) {
      sums.first[0] += dz[0];
      sums.second[0] += dz[0] * (v[0] - mean);
    });
  }
  merge_warp(sums);
  if (lane != 0) return;
  partials[item] = sums.first[0];
  partials[rows * pool.C + item] = sums.second[0] * p.invstd[c];
}

// Bytes per element of x: one read, one write, 1/4 read of dy, 1/4 byte of index. A thread owns V channels of the four
// pixels of a patch.
template <class T, int V, bool kNhwc>
__global__ void __launch_bounds__(kThreads, V == 8 ? 1 : 2)
    max_pool_backward_apply_kernel(Backward<T> p, const uint8_t* __restrict__ index, const float* __restrict__ sum_dy,
                                   const float* __restrict__ sum_dy_xhat, float count, T* __restrict__ dx, Pool pool,
                                   PoolWalk walk) {
  int64_t item = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (item >= walk.step || item >= walk.items) return;
  const bool batch = sum_dy != nullptr;
  float scale[V], shift[V], mean[V], slope[V], offset[V];
  const auto parameters = [&](int64_t c) {
    load_vector(scale, p.scale, c, true);
    load_vector(shift, p.shift, c, true);
    load_vector(mean, p.mean, c, batch);
    load_vector(slope, p.invstd, c, batch);
    load_vector(offset, sum_dy, c, batch);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      slope[j] *= batch ? -scale[j] * (__ldg(sum_dy_xhat + c + j) / count) : 0.0f;
      offset[j] *= -scale[j] / count;
    }
  };
  if constexpr (kNhwc) parameters(pool_item<V, kNhwc>(walk, item).c);

  for (; item < walk.items; item += walk.step) {
    const PoolItem at = pool_item<V, kNhwc>(walk, item);
    const Pool::Window w = pool.window(at.window);
    if constexpr (!kNhwc) parameters(at.c);
    Patch<T, V> patch;
    patch.load(p, index, pool, w, at.c);
    patch.for_each(pool, w, scale, shift, [&](int i, float (&dz)[V], const float (&v)[V]) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const float through_statistics = batch ? __fmaf_rn(slope[j], v[j] - mean[j], offset[j]) : 0.0f;
        dz[j] = __fmaf_rn(scale[j], dz[j], through_statistics);
      }
      Vec<T, V>::pack(dz).store(dx + pool.input(w.n, 2 * w.a + i / 2, 2 * w.b + i % 2, at.c));
    });
  }
}

}  // namespace resnet_fused
