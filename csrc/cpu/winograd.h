// A 3x3 convolution of stride 1 by Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv:1509.09308): for each tile d of 4x4
// pixels of x, y = A'((G w G') * (B' d B))A. Sums of 16 products make 2x2 pixels of y, where 36 would.
#pragma once

#include <algorithm>

#include "epilogue.h"
#include "panels.h"

namespace resnet_fused::cpu::RESNET_FUSED_LANES {

// As Panels, with tiles for pixels: for each of the 16 elements, the micro-kernel multiplies those of a panel's tiles,
// [tiles, C], by those of a block of weights, [C, kColumns].
template <class Micro, class In, class Out>
class Winograd {
 public:
  explicit Winograd(const Conv& conv) : conv_(conv), products_(conv) {
    products_.r = kElements, products_.s = 1;  // the elements are the rows of a filter one pixel wide
    tall_ = ceil_div(conv.oh, 2), wide_ = ceil_div(conv.ow, 2), all_ = conv.n * tall_ * wide_;
    blocks_ = ceil_div(conv.k, kColumns);
    pitch_ = conv.c * kWord + kLine;  // never a multiple of a page: see Panels
    const int64_t bytes = kElements * (pitch_ + kColumns * kWord);
    tiles_ = ceil_div(all_, ceil_div(all_, std::max<int64_t>(kCacheBytes / bytes, 2 * kPair)));
    plane_ = tiles_ * pitch_ + kLine;
  }

  int64_t units() const { return ceil_div(all_, tiles_) * blocks_; }

  void run(int64_t begin, int64_t end) {
    Micro micro;
    x_ = scratch<0>(kElements * plane_);
    sums_ = reinterpret_cast<float*>(scratch<1>(kElements * tiles_ * kColumns * sizeof(float)));
    while (begin < end) {
      const int64_t first = begin % blocks_, last = std::min(blocks_, first + end - begin);
      first_tile_ = begin / blocks_ * tiles_;
      count_ = std::min(tiles_, all_ - first_tile_);
      begin += last - first;
      finite_.resize(count_);
      for (int64_t tile = 0; tile < count_; tile++) finite_[tile] = transform_x(tile);
      for (int64_t block = first; block < last; block++) {
        const bool narrow = conv_.k - block * kColumns <= kColumns / 2;
        multiply(micro, block, narrow);
        for (int64_t tile = 0; tile < count_; tile++)
          narrow ? finish_tile<1>(tile, block) : finish_tile<2>(tile, block);
      }
    }
  }

 private:
  static constexpr int kElements = 16;
  static constexpr int64_t kPair = 2 * Micro::kRun, kCacheBytes = 768 * 1024, kLine = 64;

  struct Place {
    int64_t image, y, x;  // of the first of a tile's 2x2 pixels
  };

  Place place(int64_t tile) const {
    const int64_t i = first_tile_ + tile;
    return {i / (tall_ * wide_), i / wide_ % tall_ * 2, i % wide_ * 2};
  }

  using Pixels = const In* [4][4];

  // The channels of the pixels that a tile reads.
  void find_pixels(const Place& at, Pixels& d) const {
    const Conv& c = conv_;
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 4; j++) {
        const int64_t y = at.y + i - c.pad_h, x = at.x + j - c.pad_w;
        const bool inside = y >= 0 && y < c.h && x >= 0 && x < c.w;
        d[i][j] = inside ? static_cast<const In*>(c.x) + ((at.image * c.h + y) * c.w + x) * c.c : zeros();
      }
  }

  // B' d B of all channels; whether all of d is finite.
  bool transform_x(int64_t tile) {
    Pixels d;
    find_pixels(place(tile), d);
    char* to = x_ + tile * pitch_;
    Floats zero = {};  // until something that is not finite is multiplied by it
    for (int64_t k = 0; k < conv_.c; k += kLanes, to += kLanes * kWord) {
      Floats v[4][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const Floats d0 = load(d[0][j] + k), d1 = load(d[1][j] + k);
        const Floats d2 = load(d[2][j] + k), d3 = load(d[3][j] + k);
        v[0][j] = d0 - d2, v[1][j] = d1 + d2, v[2][j] = d2 - d1, v[3][j] = d1 - d3;
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const Floats element[4] = {v[i][0] - v[i][2], v[i][1] + v[i][2], v[i][2] - v[i][1], v[i][1] - v[i][3]};
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
          store(reinterpret_cast<float*>(to + (4 * i + j) * plane_), element[j]);
          if (i != 2 && j != 2) zero = fmadd(element[j], Floats{}, zero);  // these have all of d in them
        }
      }
    }
    return is_zero(zero);
  }

  // Zeros for the channels of a pixel outside of the image.
  const In* zeros() const {
    thread_local std::vector<In> memory;
    if (static_cast<int64_t>(memory.size()) < conv_.c) memory.resize(conv_.c);
    return memory.data();
  }

  void multiply(Micro& micro, int64_t block, bool narrow) {
    const int64_t columns = narrow ? kLanes : kColumns, words = conv_.c;
    const int64_t runs = ceil_div(count_, Micro::kRun), shorter = count_ / runs, longer = count_ % runs;
    const int64_t slices = std::min(kMostSlices, (longer + 1) / 2 + (runs - longer + 1) / 2);
    for (int64_t element = 0; element < kElements; element++)
      for (int64_t k = 0; k < words; k += Micro::kPartWords) {
        const Part part{element, element + 1, k, std::min(k + Micro::kPartWords, words), k == 0, false};
        int64_t calls = 0;
        for (int64_t tile = 0, i = 0; i < runs; calls++) {
          const int length = static_cast<int>(shorter + (i < longer));
          const int count = i + 1 < runs && length == shorter + (i + 1 < longer) ? 2 : 1;
          const char* x = x_ + tile * pitch_ + k * kWord;
          micro(Tile{products_, {{x, 0, 0, 0}, {x + (count - 1) * length * pitch_, 0, 0, 0}}, block, part,
                     sums_ + (element * count_ + tile) * columns, pitch_, 0, plane_, nullptr, 0, calls,
                     calls < slices ? slices : 0},
                length, count, narrow);
          tile += count * length;
          i += count;
        }
      }
  }

  template <int kVectors>
  void finish_tile(int64_t tile, int64_t block) {
    const Conv& c = conv_;
    const Place at = place(tile);
    Floats y[2][2][kVectors];
    finite_[tile] ? transform_sums(tile, y) : sum_directly(at, block, y);
    const int64_t height = std::min<int64_t>(2, c.oh - at.y);
    for (int64_t i = 0; i < height; i++) {
      const int64_t pixel = (at.image * c.oh + at.y + i) * c.ow + at.x;
      if (at.x + 1 < c.ow) {
        finish<Out>(c, pixel, block * kColumns, y[i]);
      } else {
        Floats single[1][kVectors];
        std::copy(y[i][0], y[i][0] + kVectors, single[0]);
        finish<Out>(c, pixel, block * kColumns, single);
      }
    }
  }

  // A' sums A.
  template <int kVectors>
  void transform_sums(int64_t tile, Floats (&y)[2][2][kVectors]) const {
    const float* from = sums_ + tile * kVectors * kLanes;
    const int64_t next = count_ * kVectors * kLanes;
#pragma GCC unroll 2
    for (int vector = 0; vector < kVectors; vector++, from += kLanes) {
      Floats rows[2][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const Floats m0 = load(from + j * next), m1 = load(from + (4 + j) * next);
        const Floats m2 = load(from + (8 + j) * next), m3 = load(from + (12 + j) * next);
        rows[0][j] = m0 + m1 + m2, rows[1][j] = m1 - m2 - m3;
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        y[i][0][vector] = rows[i][0] + rows[i][1] + rows[i][2];
        y[i][1][vector] = rows[i][1] - rows[i][2] - rows[i][3];
      }
    }
  }

  // The 36 products, of w as it is in G w G'. The 16 would spread what is not finite to pixels that do not see it.
  template <int kVectors>
  void sum_directly(const Place& at, int64_t block, Floats (&y)[2][2][kVectors]) const {
    Pixels d;
    find_pixels(at, d);
    std::fill_n(&y[0][0][0], 4 * kVectors, Floats{});
    const auto* weight = static_cast<const float*>(conv_.weight) + block * kElements * conv_.c * kColumns;
    for (int64_t k = 0; k < conv_.c; k++, weight += kColumns)
      for (int vector = 0; vector < kVectors; vector++) {
        Floats rows[3][4];
        for (int j = 0; j < 4; j++) {
          Floats u[4];
          for (int i = 0; i < 4; i++)
            u[i] = load(weight + (4 * i + j) * conv_.c * kColumns + kLanes * vector);
          rows[0][j] = u[0], rows[1][j] = u[1] - u[2], rows[2][j] = u[3];
        }
        for (int r = 0; r < 3; r++) {
          const Floats w[3] = {rows[r][0], rows[r][1] - rows[r][2], rows[r][3]};
          for (int s = 0; s < 3; s++)
            for (int i = 0; i < 2; i++)
              for (int j = 0; j < 2; j++) y[i][j][vector] += w[s] * set1(to_float(d[i + r][j + s][k]));
        }
      }
  }

  Conv conv_, products_;  // `products_` as the micro-kernel sees it
  int64_t tall_, wide_, all_, tiles_, blocks_, pitch_, plane_;
  int64_t first_tile_ = 0, count_ = 0;  // of the panel at hand
  char* x_ = nullptr;
  float* sums_ = nullptr;
  std::vector<char> finite_;  // whether all that a tile reads is
};

}  // namespace resnet_fused::cpu::RESNET_FUSED_LANES
