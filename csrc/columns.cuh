// Reductions over the rows of a row-major [rows, columns] matrix, such as the pixels of an NHWC activation.
//
// A block owns `columns` vectors of V neighbouring columns, and its threads form `lanes` rows of that width: thread t
// holds column t % columns and takes every lanes-th row from t / columns on. Each thread reduces in registers; the
// lanes are merged through shared memory in a fixed tree.
#pragma once

#include "device.cuh"

namespace resnet_fused {

// The widest tiles: a kilobyte of an fp16 row, and enough scalars for whole sectors.
constexpr int kWidestOctets = 64, kWidestScalars = 64;

struct Columns {
  int64_t vectors;  // of the matrix
  int columns;      // vectors per block
  int lanes;
  int64_t tiles;  // blocks across the matrix

  Columns(int64_t vectors_, int widest) : vectors(vectors_) {
    tiles = (vectors + widest - 1) / widest;
    columns = static_cast<int>((vectors + tiles - 1) / tiles);
    lanes = kThreads / columns;
  }
};

// Where a thread stands. Threads left over by a width that does not divide the block are idle, but take part in the
// barriers.
struct Place {
  int lane;
  int64_t vector;
  bool active;

  __device__ __forceinline__ Place(const Columns& c, int64_t tile)
      : lane(threadIdx.x / c.columns),
        vector(tile * c.columns + threadIdx.x % c.columns),
        active(lane < c.lanes && vector < c.vectors) {}
};

// Merges the lanes' values in a fixed tree; lane 0 ends up with the result. `Value` has `merge(const Value&)` and is an
// array of `kFloats` floats.
template <class Value>
__device__ __forceinline__ void merge_lanes(Value& mine, int columns, int lane, int lanes) {
  constexpr int kFloats = sizeof(Value) / sizeof(float);
  SHARED_ARRAY(float, exchange, kFloats* kThreads);
  float* const own = reinterpret_cast<float*>(&mine);
  int half = 1;
  while (2 * half < lanes) half *= 2;
  if (lanes == 1) half = 0;
  for (; half > 0; half /= 2) {
    if (lane >= half && lane < 2 * half && lane < lanes) {
#pragma unroll
      for (int i = 0; i < kFloats; ++i) exchange[i * kThreads + threadIdx.x] = own[i];
    }
    // One barrier a step is enough: the next step writes slots below those that this one reads.
    __syncthreads();
    if (lane < half && lane + half < lanes) {
      Value other;
#pragma unroll
      for (int i = 0; i < kFloats; ++i)
        reinterpret_cast<float*>(&other)[i] = exchange[i * kThreads + threadIdx.x + half * columns];
      mine.merge(other);
    }
  }
}

// Merges a warp's values in a butterfly: every lane ends up with the result.
template <class Value>
__device__ __forceinline__ void merge_warp(Value& mine) {
  constexpr int kFloats = sizeof(Value) / sizeof(float);
  float* const own = reinterpret_cast<float*>(&mine);
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) {
    Value other;
#pragma unroll
    for (int i = 0; i < kFloats; ++i) reinterpret_cast<float*>(&other)[i] = __shfl_xor_sync(kAllLanes, own[i], bit);
    mine.merge(other);
  }
}

// Two sums per column.
template <int V>
struct Sums {
  float first[V], second[V];

  __device__ __forceinline__ Sums() {
#pragma unroll
    for (int j = 0; j < V; ++j) first[j] = second[j] = 0.0f;
  }
  __device__ __forceinline__ void merge(const Sums& other) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      first[j] += other.first[j];
      second[j] += other.second[j];
    }
  }
};

}  // namespace resnet_fused
