// The part of CUDA C++ that the kernels use, in plain C++: qualifiers, vector types, intrinsics. Execution is in
// execute.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "execute.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define threadIdx (::host::index().thread)
#define blockIdx (::host::index().block)
#define blockDim (::host::index().block_dim)
#define gridDim (::host::index().grid_dim)

// Only the address of the function-local static counts: it names the declaration, per template instance.
#define SHARED_ARRAY(type, name, count) \
  static const char name##_site = 0;    \
  type* const name = static_cast<type*>(::host::shared_array(&name##_site, sizeof(type) * (count)))
#define DYNAMIC_SHARED_ARRAY(type, name) type* const name = static_cast<type*>(::host::dynamic_shared())

#define __syncthreads() ::host::block_barrier(__FILE__, __LINE__)
#define __syncwarp() static_cast<void>(::host::ballot(0xffffffffu, true, __FILE__, __LINE__))
#define __ballot_sync(mask, predicate) ::host::ballot(mask, predicate, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, bits) ::host::shuffle(mask, value, ::host::lane_id() ^ (bits), __FILE__, __LINE__)
#define __shfl_down_sync(mask, value, by) ::host::shuffle(mask, value, ::host::lane_id() + (by), __FILE__, __LINE__)
#define __shfl_sync(mask, value, lane) ::host::shuffle(mask, value, (lane) % 32, __FILE__, __LINE__)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

using half = c10::Half;
using bfloat16 = c10::BFloat16;

namespace host {
template <class T>
T shuffle(unsigned mask, T value, unsigned lane, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = exchange(mask, word, lane, file, line);
  std::memcpy(&value, &word, sizeof(T));
  return value;
}
}  // namespace host

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
