// What every kernel stands on: the CUDA language (or its host twin), data types, octets of elements, division by a
// runtime constant.
#pragma once

#include <cstdint>

#ifdef RESNET_FUSED_HOST
#include "host/cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// The same line declares shared memory on a GPU and in the host twin.
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]
using bfloat16 = __nv_bfloat16;
#endif

namespace resnet_fused {

constexpr int kThreads = 256;  // of every block
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef RESNET_FUSED_HOST
template <class T>
T rounded(float v) {
  return static_cast<T>(v);
}
template <class T>
float widened(T v) {
  return static_cast<float>(v);
}
template <class T>
float2 widened_pair(unsigned word) {
  T pair[2];
  std::memcpy(pair, &word, sizeof word);
  return {widened(pair[0]), widened(pair[1])};
}
template <class T>
unsigned rounded_pair(float low, float high) {
  const T pair[2] = {rounded<T>(low), rounded<T>(high)};
  unsigned word;
  std::memcpy(&word, pair, sizeof word);
  return word;
}
#else
template <class T>
__device__ __forceinline__ T rounded(float v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else if constexpr (std::is_same_v<T, half>) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}
__device__ __forceinline__ float widened(float v) { return v; }
__device__ __forceinline__ float widened(half v) { return __half2float(v); }
__device__ __forceinline__ float widened(bfloat16 v) { return __bfloat162float(v); }
// Two 16-bit elements in one register, the lower address in the lower half.
template <class T>
__device__ __forceinline__ float2 widened_pair(unsigned word) {
  if constexpr (std::is_same_v<T, half>) {
    return __half22float2(reinterpret_cast<const __half2&>(word));
  } else {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  }
}
template <class T>
__device__ __forceinline__ unsigned rounded_pair(float low, float high) {
  if constexpr (std::is_same_v<T, half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const unsigned&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const unsigned&>(pair);
  }
}
#endif

// The largest value that rounds to zero: v rounds to something positive exactly where not (v <= kRoundsToZero), and so
// does a NaN pass. Half of the smallest subnormal is a tie, which goes to the even zero.
template <class T>
constexpr float kRoundsToZero = std::is_same_v<T, float>  ? 0.0f
                                : std::is_same_v<T, half> ? 0x1p-25f
                                                          : 0x1p-134f;

// Whether ReLU's gradient passes an element whose value before rounding to T is v: not (round(v) <= 0).
template <class T>
__device__ __forceinline__ bool passes(float v) {
  return !(v <= kRoundsToZero<T>);
}

// V consecutive elements of memory. V = 8, an octet: 16-byte accesses, one for 16-bit types and two for fp32. V = 1:
// any alignment.
template <class T, int V>
struct Vec;

template <class T>
struct Vec<T, 8> {
  static constexpr int kWords = sizeof(T) / 2;
  uint4 word[kWords];

  static __device__ __forceinline__ Vec load(const T* __restrict__ from) {
    Vec v;
#pragma unroll
    for (int i = 0; i < kWords; ++i) v.word[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    return v;
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint4*>(to)[i] = word[i];
  }
  __device__ __forceinline__ void unpack(float (&out)[8]) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const unsigned w[4] = {word[i].x, word[i].y, word[i].z, word[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
          out[4 * i + j] = __uint_as_float(w[j]);
        } else {
          const float2 pair = widened_pair<T>(w[j]);
          out[2 * j] = pair.x;
          out[2 * j + 1] = pair.y;
        }
      }
    }
  }
  static __device__ __forceinline__ Vec pack(const float (&in)[8]) {
    Vec v;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      unsigned w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
          w[j] = __float_as_uint(in[4 * i + j]);
        } else {
          w[j] = rounded_pair<T>(in[2 * j], in[2 * j + 1]);
        }
      }
      v.word[i] = {w[0], w[1], w[2], w[3]};
    }
    return v;
  }
};

template <class T>
struct Vec<T, 1> {
  T value;

  static __device__ __forceinline__ Vec load(const T* __restrict__ from) { return {*from}; }
  __device__ __forceinline__ void store(T* to) const { *to = value; }
  __device__ __forceinline__ void unpack(float (&out)[1]) const { out[0] = widened(value); }
  static __device__ __forceinline__ Vec pack(const float (&in)[1]) { return {rounded<T>(in[0])}; }
};

// The octet of elements that starts at i of a buffer of `count`: 16-byte accesses if the base is `aligned` and the
// octet is whole, else one by one.
template <class T>
__device__ __forceinline__ Vec<T, 8> load_octet(const T* __restrict__ from, int64_t i, int64_t count, bool aligned) {
  if (aligned && i + 8 <= count) return Vec<T, 8>::load(from + i);
  float v[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = i + j < count ? widened(from[i + j]) : 0.0f;
  return Vec<T, 8>::pack(v);
}

template <class T>
__device__ __forceinline__ void store_octet(T* to, int64_t i, int64_t count, bool aligned, const float (&v)[8]) {
  if (aligned && i + 8 <= count) {
    Vec<T, 8>::pack(v).store(to + i);
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (i + j < count) to[i + j] = rounded<T>(v[j]);
  }
}

// How many vectors a thread loads before it uses the first: 64 bytes in flight per input.
template <class T, int V>
constexpr int kInFlight = V == 1 ? 8 : 8 / static_cast<int>(sizeof(T));

// Division of n >= 0 by a constant d > 0 that is known at launch: a multiplication where both fit in 31 bits, 64-bit
// division otherwise.
struct Divider {
  int64_t d;
  unsigned multiplier, shift;

  explicit Divider(int64_t divisor) : d(divisor), multiplier(0), shift(31) {
    if (d >= int64_t(1) << 31) return;  // then the quotient of a 31-bit number is 0, as n >> 31 gives
    for (shift = 0; (int64_t(1) << shift) < d; ++shift) {
    }
    multiplier = static_cast<unsigned>(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d)) / d + 1);
  }
  __device__ __forceinline__ int64_t quotient(int64_t n) const {
    if (n >> 31 == 0) return (__umulhi(static_cast<unsigned>(n), multiplier) + static_cast<unsigned>(n)) >> shift;
    return n / d;
  }
  __device__ __forceinline__ int64_t remainder(int64_t n) const { return n - quotient(n) * d; }
};

}  // namespace resnet_fused
