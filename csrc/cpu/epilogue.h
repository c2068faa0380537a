// The epilogue, act(scale * sum + bias + residual), of a vector of channels at a time, for the element types of y.
#pragma once

#include <type_traits>

#include "panels.h"

namespace resnet_fused::cpu::RESNET_FUSED_LANES {

inline Floats as_float(Floats sum) { return sum; }
inline Floats as_float(Ints sum) { return to_float(sum); }

// 8 bits as they are: Panels folds the grids into scale and bias.
template <class Out, class Which>
Floats load_value(const Out* p, Which which) {
  if constexpr (sizeof(Out) == 1) {
    return to_float(load_ints(p, which));
  } else {
    return load(p, which);
  }
}
template <class Out, class Which>
void store_value(Out* p, Floats v, int32_t least, Which which) {
  if constexpr (sizeof(Out) == 1) {
    store_ints(p, max(round(v), set1(least)), which);
  } else {
    store(p, v, which);
  }
}

// What the epilogue of a tile will read and write, asked for pixel by pixel while the sums are formed.
template <class Out>
class Results {
 public:
  Results(const Tile& tile, int length) : step_(tile.conv.k * sizeof(Out)), left_(length) {
    const Conv& c = tile.conv;
    const int64_t column = tile.block * kColumns * static_cast<int64_t>(sizeof(Out));
    y_ = static_cast<char*>(c.y) + tile.runs[0].pixel * step_ + column;
    if (c.residual) residual_ = static_cast<const char*>(c.residual) + tile.runs[0].pixel * step_ + column;
    jump_ = (tile.runs[1].pixel - tile.runs[0].pixel - length) * step_;
  }

  void fetch() {
    for (size_t line = 0; line < kColumns * sizeof(Out); line += 64) {
      __builtin_prefetch(y_ + line, 1, 3);
      if (residual_) __builtin_prefetch(residual_ + line, 0, 3);
    }
    const int64_t step = --left_ == 0 ? step_ + jump_ : step_;
    y_ += step;
    if (residual_) residual_ += step;
  }

 private:
  int64_t step_, jump_, left_;  // to the next pixel, more at the end of a run, pixels until then
  char* y_;
  const char* residual_ = nullptr;
};

// `which(j)` says which lanes of vector j of the columns are channels.
template <class Out, class Which, int kPixels, int kVectors, class Sum>
[[gnu::always_inline]] inline void finish(const Conv& c, int64_t pixel, int64_t column, Sum (&sums)[kPixels][kVectors],
                                          Which which) {
  constexpr bool kEight = sizeof(Out) == 1;
  const int64_t at = pixel * c.k + column;
  Floats v[kPixels][kVectors];
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; j++) {
    const Floats bias = load(c.bias + column + kLanes * j);
    const Floats scale = c.scale ? load(c.scale + column + kLanes * j) : set1(1.f);
#pragma GCC unroll 7
    for (int i = 0; i < kPixels; i++) v[i][j] = fmadd(as_float(sums[i][j]), scale, bias);
  }
  if (c.residual) {
    const Out* residual = static_cast<const Out*>(c.residual) + at;
#pragma GCC unroll 7
    for (int i = 0; i < kPixels; i++)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; j++) {
        const Floats added = load_value(residual + i * c.k + kLanes * j, which(j));
        v[i][j] = kEight ? fmadd(added, set1(c.residual_grid.scale), v[i][j]) : v[i][j] + added;
      }
  }
  if (c.relu && !kEight) {
#pragma GCC unroll 7
    for (int i = 0; i < kPixels; i++)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; j++) v[i][j] = max(Floats{}, v[i][j]);  // in this order a NaN stays
  }
  const int32_t least = c.relu ? c.y_grid.zero_point : 0;
  Out* y = static_cast<Out*>(c.y) + at;
  const int64_t k = c.k;  // not read anew behind each store of bytes
#pragma GCC unroll 7
  for (int i = 0; i < kPixels; i++)
    if constexpr (kEight && kVectors == 2 && std::is_same_v<decltype(which(0)), All>) {
      store_ints(y + i * k, round(v[i][0]), round(v[i][1]), least);
    } else {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; j++) store_value(y + i * k + kLanes * j, v[i][j], least, which(j));
    }
}

template <class Out, int kPixels, int kVectors, class Sum>
[[gnu::noinline]] void finish_some(const Conv& c, int64_t pixel, int64_t column, Sum (&sums)[kPixels][kVectors]) {
  finish<Out>(c, pixel, column, sums, [left = c.k - column](int j) { return Some(left - kLanes * j); });
}

// Sums of kPixels pixels from `pixel` on, by kVectors vectors of columns from `column` on, some of which may be behind
// the last channel.
template <class Out, int kPixels, int kVectors, class Sum>
[[gnu::always_inline]] inline void finish(const Conv& c, int64_t pixel, int64_t column, Sum (&sums)[kPixels][kVectors]) {
  if (column + kLanes * kVectors <= c.k) {
    finish<Out>(c, pixel, column, sums, [](int) { return All{}; });
  } else {
    Sum copy[kPixels][kVectors];  // so that the sums themselves may stay in registers
    std::memcpy(copy, sums, sizeof(copy));
    finish_some<Out>(c, pixel, column, copy);
  }
}

}  // namespace resnet_fused::cpu::RESNET_FUSED_LANES
