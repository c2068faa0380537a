// Max pooling: see MaxPool.
#pragma once

#include <algorithm>
#include <limits>

#include "conv.h"
#include "lanes.h"

namespace resnet_fused::cpu::RESNET_FUSED_LANES {

// The largest values of a vector of channels. A NaN stays.
template <class T>
struct Largest {
  static constexpr int64_t kChannels = kLanes;
  Floats most = set1(-std::numeric_limits<float>::infinity());

  explicit Largest(int64_t) {}
  void see(const T* from) { most = keep_nan(max(most, load(from)), most); }
  void write(T* to) const { store(to, most); }
};

// Of a vector of 8 bits, as they are.
template <>
struct Largest<uint8_t> {
  static constexpr int64_t kChannels = 4 * kLanes;
  int64_t left;
  Ints most = {};

  explicit Largest(int64_t left) : left(left) {}
  void see(const uint8_t* from) { most = max_bytes(most, load_bytes(from, left)); }
  void write(uint8_t* to) const { store_bytes(to, most, left); }
};

template <class T>
void max_pool_of(const MaxPool& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  for (int64_t row = begin; row < end; row++) {
    const int64_t top = row % p.oh * p.stride_h - p.pad_h, image = row / p.oh * p.h;
    const int64_t iy0 = std::max<int64_t>(top, 0), iy1 = std::min(top + p.r, p.h);
    for (int64_t ox = 0; ox < p.ow; ox++) {
      const int64_t left = ox * p.stride_w - p.pad_w;
      const int64_t ix0 = std::max<int64_t>(left, 0), ix1 = std::min(left + p.s, p.w);
      T* to = static_cast<T*>(p.y) + (row * p.ow + ox) * p.c;
      for (int64_t channel = 0; channel < p.c; channel += Largest<T>::kChannels) {
        Largest<T> largest(p.c - channel);
        for (int64_t iy = iy0; iy < iy1; iy++)
          for (int64_t ix = ix0; ix < ix1; ix++) largest.see(x + ((image + iy) * p.w + ix) * p.c + channel);
        largest.write(to + channel);
      }
    }
  }
}

inline void max_pool(const MaxPool& pool, int bytes, int64_t begin, int64_t end) {
  (bytes == 4 ? max_pool_of<float> : bytes == 2 ? max_pool_of<BFloat16> : max_pool_of<uint8_t>)(pool, begin, end);
}

}  // namespace resnet_fused::cpu::RESNET_FUSED_LANES
