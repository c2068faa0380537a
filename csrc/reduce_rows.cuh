// reduce_rows: the sum over dimension 0 of [rows, inner] in fp32 and a fixed order, rounded once.
//
// Bytes: every partial is read once. A block owns a tile of columns (columns.cuh); grid.y independent matrices lie one
// after the other.
#pragma once

#include "columns.cuh"

namespace resnet_fused {

template <int V>
struct Sum {
  float value[V];

  __device__ __forceinline__ Sum() {
#pragma unroll
    for (int j = 0; j < V; ++j) value[j] = 0.0f;
  }
  __device__ __forceinline__ void merge(const Sum& other) {
#pragma unroll
    for (int j = 0; j < V; ++j) value[j] += other.value[j];
  }
};

// partials [gridDim.y, rows, inner]; the matrix y goes to out0 (y = 0) or out1 (y = 1), [inner] each.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) reduce_rows_kernel(const T* __restrict__ partials, T* __restrict__ out0,
                                                               T* __restrict__ out1, int64_t rows, Columns tiling) {
  constexpr int kUnroll = kInFlight<T, V>;
  const int64_t inner = tiling.vectors * V;
  const Place at(tiling, blockIdx.x);
  const T* const column = partials + blockIdx.y * rows * inner + at.vector * V;
  Sum<V> sum;
  if (at.active) {
    for (int64_t row = at.lane; row < rows; row += kUnroll * tiling.lanes) {
      Vec<T, V> loaded[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (row + u * tiling.lanes < rows) loaded[u] = Vec<T, V>::load(column + (row + u * tiling.lanes) * inner);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (row + u * tiling.lanes >= rows) continue;
        Sum<V> next;
        loaded[u].unpack(next.value);
        sum.merge(next);
      }
    }
  }
  merge_lanes(sum, tiling.columns, at.lane, tiling.lanes);
  if (at.active && at.lane == 0) Vec<T, V>::pack(sum.value).store((blockIdx.y == 0 ? out0 : out1) + at.vector * V);
}

}  // namespace resnet_fused
