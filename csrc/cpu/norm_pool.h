// The stem's batch norm, ReLU and max pool, and their backward: see norm.h.
#pragma once

#include <algorithm>
#include <limits>

#include "norm.h"
#include "norm_vectors.h"

namespace resnet_fused::cpu::RESNET_FUSED_LANES {

template <class T>
void pool_of(const NormPool& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  for (int64_t row = begin; row < end; row++) {
    const int64_t image = row / p.oh * p.h, top = row % p.oh * 2 - 1;
    const int64_t r0 = top < 0, r1 = std::min<int64_t>(3, p.h - top);
    for (int64_t column = 0; column < p.ow; column++) {
      const int64_t left = column * 2 - 1, s0 = left < 0, s1 = std::min<int64_t>(3, p.w - left);
      const int64_t to = (row * p.ow + column) * p.c;
      for_channels(p.c, [&](int64_t j, auto which) __attribute__((always_inline)) {
        const Floats scale = load(p.scale + j, which), shift = load(p.shift + j, which);
        Floats most = set1(-std::numeric_limits<float>::infinity());
        Ints winner = {};
        for (int64_t r = r0; r < r1; r++)
          for (int64_t s = s0; s < s1; s++) {
            const T* from = x + ((image + top + r) * p.w + left + s) * p.c + j;
            const Floats v = rounded<T>(relu_of(fmadd(load(from, which), scale, shift)));
            const Pass better = wins(v, most);  // of equals the first, of NaNs the last
            most = choose(better, v, most);
            winner = choose(better, set1(static_cast<int32_t>(3 * r + s)), winner);
          }
        write(static_cast<T*>(p.y) + to + j, most, which);
        store_ints(p.winners + to + j, winner, which);
      });
    }
  }
}

// dz of one pixel's channels: what the windows give whose winner it is.
template <class T, class Which>
[[gnu::always_inline]] inline Floats pooled_gradient(const NormPool& p, int64_t image, int64_t row, int64_t column,
                                                     int64_t j, Which which) {
  Floats dz{};
  for (int64_t oy = row / 2; oy <= std::min((row + 1) / 2, p.oh - 1); oy++)
    for (int64_t ox = column / 2; ox <= std::min((column + 1) / 2, p.ow - 1); ox++) {
      const int64_t at = ((image * p.oh + oy) * p.ow + ox) * p.c + j;
      const int64_t place = 3 * (row - 2 * oy + 1) + column - 2 * ox + 1;
      const Pass won = equal(load_ints(p.index + at, which), set1(static_cast<int32_t>(place)));
      dz = add(dz, select(won, load(static_cast<const T*>(p.dy) + at, which)));
    }
  return dz;
}

// body(place in x, channel, dz, x, which lanes)
template <class T, class Body>
[[gnu::always_inline]] inline void for_pooled(const NormPool& p, int64_t begin, int64_t end, Body body) {
  const T* x = static_cast<const T*>(p.x);
  for (int64_t row = begin; row < end; row++)
    for (int64_t column = 0; column < p.w; column++)
      for_channels(p.c, [&](int64_t j, auto which) __attribute__((always_inline)) {
        const int64_t at = (row * p.w + column) * p.c + j;
        const Floats value = load(x + at, which);
        const Pass passes = above_zero(rounded<T>(fmadd(value, load(p.scale + j, which), load(p.shift + j, which))));
        const Floats dz = pooled_gradient<T>(p, row / p.h, row % p.h, column, j, which);
        body(at, j, select(passes, dz), value, which);
      });
}

template <class T>
void pool_backward_sums_of(const NormPool& p, int64_t begin, int64_t end, float* sums, float* products) {
  for_pooled<T>(p, begin, end, [&](int64_t, int64_t j, Floats dz, Floats x, auto which) __attribute__((always_inline)) {
    const Floats product = multiply(dz, subtract(x, load(p.mean + j, which)));
    store(sums + j, add(load(sums + j, which), dz), which);
    store(products + j, add(load(products + j, which), product), which);
  });
}

template <class T>
void pool_backward_apply_of(const NormPool& p, int64_t begin, int64_t end) {
  for_pooled<T>(p, begin, end, [&](int64_t at, int64_t j, Floats dz, Floats x, auto which)
                                   __attribute__((always_inline)) {
    const Floats scale = load(p.scale + j, which);
    Floats dx = multiply(scale, dz);
    if (p.slope != nullptr) {
      const Floats centred = subtract(x, load(p.mean + j, which));
      dx = fmadd(scale, dz, fmadd(centred, load(p.slope + j, which), load(p.offset + j, which)));
    }
    write(static_cast<T*>(p.dx) + at, dx, which);
  });
}

}  // namespace resnet_fused::cpu::RESNET_FUSED_LANES
