// How a convolution is split: into panels of output pixels that fit in a core's cache with what they read, each panel
// into runs of neighbouring pixels, and each run by blocks of two vectors of output channels.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "conv.h"
#include "lanes.h"

namespace resnet_fused::cpu::RESNET_FUSED_LANES {

constexpr int kColumns = 2 * kLanes;  // output channels of one block of packed weights
// By how many tiles the weights of the next part are fetched at most: evenly where memory is slow for the arithmetic.
constexpr int64_t kMostSlices = kLanes == 16 ? 2 : 1 << 20;

// Neighbouring pixels of an output row: what the first one reads first, its number, and the rows [r0, r1) of the filter
// that are to be multiplied: the others read zeros alone.
struct Run {
  const char* x;
  int64_t pixel;
  int64_t r0, r1;
};

// A part of a sum's products: rows [r0, r1) of the filter, of each the words [k0, k1).
struct Part {
  int64_t r0, r1, k0, k1;
  bool first, last;
};

// What a micro-kernel computes in one call: 1 or 2 runs of one length by one block of columns.
struct Tile {
  const Conv& conv;
  Run runs[2];
  int64_t block;
  Part part;
  float* sums;  // of the parts before, where the tile's are kept until the last
  int64_t pitch;      // bytes of x from one output pixel to the next
  int64_t tap_pitch;  // ... from one column of the filter to the next
  int64_t row_pitch;  // ... from one row of the filter to the next
  const char* next;   // what is to be fetched of x and y: for the next tile, or for the next panel; or null
  int64_t next_step;  // bytes of it that go with one word of each pixel, or with one AMX tile of them
  int64_t slice, slices;  // of the next part's weights, the one to be fetched, of how many; none if 0
};

struct Bytes {
  const char* from;
  int64_t count;
};

// What the next panel reads and writes, asked for in even slices, one with each tile of this one: a core waits for few
// lines at a time, and asked for at once they would hold up what the tiles need now.
class Ahead {
 public:
  void start(Bytes x, Bytes y, int64_t slices) {
    const int64_t of_x = slices * x.count / std::max<int64_t>(x.count + y.count, 1), of_y = slices - of_x;
    x_ = {x.from, of_x ? x.count / of_x : 0}, x_left_ = of_x;
    y_ = {y.from, of_y ? y.count / of_y : 0}, y_left_ = of_y;
  }

  Bytes next() {
    Bytes& of = x_left_ > 0 ? x_ : y_;
    if ((x_left_ > 0 ? x_left_ : y_left_)-- <= 0) return {nullptr, 0};
    const Bytes slice = of;
    of.from += of.count;
    return slice;
  }

 private:
  Bytes x_{}, y_{};  // the next slice of each
  int64_t x_left_ = 0, y_left_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A thread's memory, of three: 0 for copies of pixels, 1 for sums, 2 for scales and biases.
template <int kWhich>
char* scratch(size_t bytes) {
  constexpr size_t kLine = 64;
  thread_local std::vector<char> memory;  // kept: its pages are there the next time
  if (memory.size() < bytes + kLine) memory.resize(bytes + kLine);
  return memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & (kLine - 1));
}

// A Micro is a micro-kernel: X, the type of x; In, the one it is multiplied in; kInBytes and kOutBytes, of an In and of
// a value of y; kRun, the most pixels of a run; kStepBytes, of each pixel that a step of its loop takes; kPartWords, the
// most products of a part of a sum, in words; kByTap, whether it finds each column of the filter by itself; kByRow,
// whether it multiplies no rows but a part's; and operator()(tile, pixels of a run, number of runs, whether only one
// vector of columns is left).
template <class Micro>
class Panels {
 public:
  explicit Panels(const Conv& conv) : conv_(conv) {
    Conv& c = conv_;
    padded_ = c.pad_h != 0 || c.pad_w != 0 || (kWidens && c.r * c.s != 1);
    if (c.r == 1 && c.s == 1 && !padded_ && c.stride_h == 1 && c.stride_w == 1) {  // all pixels are one row
      c.w = c.ow = c.n * c.h * c.w;
      c.n = c.h = c.oh = 1;
    }
    pixel_bytes_ = c.c * Micro::kInBytes;
    pitch_ = c.stride_w * pixel_bytes_;
    // Pixels a page apart lie in one set of L1, which has not the ways for those of a tile: copied, they do not.
    apart_ = c.s == 1 && c.r == 1 && !padded_ && (kWidens || pitch_ % kPage == 0);
    const bool divisible = Micro::kByTap || pixel_bytes_ % (Micro::kPartWords * kWord) == 0;
    gap_ = padded_ && pitch_ % kPage == 0 && divisible ? kLine : 0;
    pitch_ = apart_ ? pixel_bytes_ + kLine : c.stride_w * (pixel_bytes_ + gap_);
    row_pitch_ = (c.w + 2 * c.pad_w) * (pixel_bytes_ + gap_);
    blocks_ = (c.k + kColumns - 1) / kColumns;
    // Small weights stay in the cache, and small panels then write whole pixels; but each panel copies its padding.
    // Weights that do not stay are read once a panel, which is large then.
    const int64_t weights = c.r * c.s * c.k * c.group * Micro::kInBytes;
    const int64_t budget = weights > 4 * kCacheBytes ? 2 * kCacheBytes
                           : weights <= kCacheBytes ? kCacheBytes / (padded_ ? 4 : 8)
                                                                : kCacheBytes;
    const int64_t reads = c.r * c.s == 1 ? 1 : c.stride_h * c.stride_w;  // pixels for each that is written
    const int64_t bytes = reads * pixel_bytes_ + c.k * Micro::kOutBytes;
    const int64_t pixels = std::max<int64_t>(budget / bytes, 4 * Micro::kRun);
    const int64_t rows = c.n * c.oh;
    columns_ = even_columns(pixels);
    rows_ = columns_ < c.ow ? 1 : std::max<int64_t>(pixels / c.ow, 1);
    rows_ = ceil_div(rows, ceil_div(rows, rows_));  // panels of even size
    across_ = ceil_div(c.ow, columns_);
    panels_ = ceil_div(rows, rows_) * across_;
    const int64_t words = ceil_div(c.s * pixel_bytes_, kWord);
    part_rows_ = std::clamp<int64_t>(Micro::kPartWords / words, 1, c.r);
    part_words_ = ceil_div(words, ceil_div(words, part_rows_ * Micro::kPartWords));
    parts_ = ceil_div(c.r, part_rows_) * ceil_div(words, part_words_);
  }

  int64_t units() const { return panels_ * blocks_; }

  void run(int64_t begin, int64_t end) {
    Micro micro;
    if constexpr (Micro::kOutBytes == 1) fold_grids();
    for (bool fetched = false; begin < end; fetched = true) {
      const int64_t first = begin % blocks_, last = std::min(blocks_, first + end - begin);
      find_runs(begin / blocks_);
      begin += last - first;
      ahead_.start(next_x_, next_y_, begin < end ? (last - first) * parts_ * tiles_of_panel() : 0);
      for (int64_t block = first; block < last; block++) multiply(micro, block, block == first && !fetched);
    }
  }

 private:
  using X = typename Micro::X;
  using In = typename Micro::In;
  static constexpr bool kWidens = sizeof(X) != sizeof(In);  // x is copied, then
  static constexpr int64_t kCacheBytes = 32 * 1024 * kLanes, kPage = 4096, kLine = 64;

  // The width of panels of whole tiles, from half to twice `pixels`, that leaves the least of the last one empty: threads
  // get equal numbers of panels.
  int64_t even_columns(int64_t pixels) const {
    const int64_t row = conv_.ow, wanted = std::max<int64_t>((row + pixels / 2) / pixels, 1), tile = 2 * Micro::kRun;
    int64_t best = row, best_empty = row, best_off = 0;
    for (int64_t panels = ceil_div(wanted, 2); panels <= 2 * wanted; panels++) {
      const int64_t columns = panels == 1 ? row : ceil_div(ceil_div(row, panels), tile) * tile;
      const int64_t empty = ceil_div(row, columns) * columns - row, off = std::abs(panels - wanted);
      if (empty < best_empty || (empty == best_empty && off < best_off))
        best = columns, best_empty = empty, best_off = off;
    }
    return best;
  }

  // Scale, bias and the residual's scale become those of results in steps of y's grid, from its zero point: once, as a
  // tile of a short sum has little time for it.
  void fold_grids() {
    Conv& c = conv_;
    const float step = 1 / c.y_grid.scale;
    c.residual_grid.scale *= step;
    float shift = static_cast<float>(c.y_grid.zero_point);
    if (c.residual) shift -= c.residual_grid.scale * static_cast<float>(c.residual_grid.zero_point);
    float* scale = reinterpret_cast<float*>(scratch<2>(2 * blocks_ * kColumns * sizeof(float)));
    float* bias = scale + blocks_ * kColumns;
    for (int64_t k = 0; k < blocks_ * kColumns; k += kLanes) {
      store(scale + k, (c.scale ? load(c.scale + k) : set1(1.f)) * set1(step));
      store(bias + k, fmadd(load(c.bias + k), set1(step), set1(shift)));
    }
    c.scale = scale, c.bias = bias;
  }

  int64_t tiles_of_panel() const { return (runs_[0].size() + 1) / 2 + (runs_[1].size() + 1) / 2; }

  // By parts of the sums, whose weights stay in the cache while all tiles of the panel meet them.
  void multiply(Micro& micro, int64_t block, bool fresh) {
    const int64_t words = ceil_div(conv_.s * pixel_bytes_, kWord);
    for (int64_t r = 0; r < conv_.r; r += part_rows_)
      for (int64_t k = 0; k < words; k += part_words_) {
        const Part part{r, std::min(r + part_rows_, conv_.r), k, std::min(k + part_words_, words), r + k == 0,
                        r + part_rows_ >= conv_.r && k + part_words_ >= words};
        multiply(micro, block, part, fresh && part.first);
      }
  }

  void multiply(Micro& micro, int64_t block, const Part& part, bool fresh) {
    const bool narrow = conv_.k - block * kColumns <= kColumns / 2;
    const int64_t steps = ceil_div((part.k1 - part.k0) * kWord, Micro::kStepBytes);
    const bool ends = part.k1 >= ceil_div(conv_.s * pixel_bytes_, kWord);  // the rows of the filter
    const int64_t x = part.k0 * kWord + part.k0 * kWord / pixel_bytes_ * gap_;
    const int64_t slices = std::min(kMostSlices, tiles_of_panel());
    int64_t tiles = 0;
    for (int kind = 0; kind < 2; kind++) {
      const auto& runs = runs_[kind];
      for (size_t i = 0, count; i < runs.size(); i += count) {
        Run first = runs[i], last = i + 1 < runs.size() ? runs[i + 1] : first;
        count = i + 1 < runs.size() && last.r0 == first.r0 && last.r1 == first.r1 ? 2 : 1;
        if (count == 1) last = first;
        Part rows = part;
        rows.r0 = std::max(part.r0, first.r0), rows.r1 = std::min(part.r1, first.r1);
        rows.first = part.k0 == 0 && part.r0 <= first.r0;
        rows.last = ends && part.r1 >= first.r1;
        if (rows.r0 >= rows.r1) continue;
        first.x += x, last.x += x;
        Bytes next = ahead_.next();
        if (fresh && !padded_ && !apart_) next = {last.x + lengths_[kind] * pitch_, 2 * Micro::kRun * pitch_};
        const bool fetches = tiles < slices && !(part.last && block + 1 == blocks_);
        float* sums = sums_ + (kind * runs_[0].size() + i) * Micro::kRun * kColumns;
        micro(Tile{conv_, {first, last}, block, rows, sums, pitch_, pixel_bytes_ + gap_, row_pitch_, next.from,
                   ceil_div(next.count, (rows.r1 - rows.r0) * steps), tiles, fetches ? slices : 0},
              lengths_[kind], static_cast<int>(count), narrow);
        tiles++;
      }
    }
  }

  // The rows of the filter, laid on the image from row `top` on, that do not lie on zeros alone.
  std::pair<int64_t, int64_t> rows_inside(int64_t top) const {
    const Conv& c = conv_;
    const bool zeros = sizeof(X) != 1 || c.x_grid.zero_point == 0;
    const int64_t r0 = std::max<int64_t>(-top, 0), r1 = std::min(c.r, c.h - top);
    return Micro::kByRow && zeros && r0 < r1 ? std::pair{r0, r1} : std::pair{int64_t{0}, c.r};
  }

  // A row is split evenly, into runs of two lengths: a short run costs as many loads of weights as a long one.
  void find_runs(int64_t panel) {
    const Conv& c = conv_;
    const int64_t row0 = panel / across_ * rows_, row1 = std::min(row0 + rows_, c.n * c.oh);
    const int64_t column0 = panel % across_ * columns_, width = std::min(columns_, c.ow - column0);
    const int64_t count = ceil_div(width, Micro::kRun), longer = width % count;
    lengths_[1] = static_cast<int>(width / count);
    lengths_[0] = lengths_[1] + 1;
    runs_[0].clear();
    runs_[1].clear();
    sums_ = reinterpret_cast<float*>(scratch<1>((row1 - row0) * (count + 1) * Micro::kRun * kColumns * sizeof(float)));
    if (padded_) copy_padded(row0, row1);
    char* to = apart_ ? scratch<0>((row1 - row0) * width * pitch_) : nullptr;
    int64_t copied = 0;  // rows of the copy before the one at hand
    for (int64_t row = row0; row < row1; row++) {
      const int64_t image = row / c.oh, oy = row % c.oh;
      if (row != row0) copied += oy == 0 ? c.r : c.stride_h;
      const auto [r0, r1] = rows_inside(oy * c.stride_h - c.pad_h);
      const int64_t pixel_pitch = padded_ ? pixel_bytes_ + gap_ : c.c * sizeof(X);
      const char* x = padded_ ? copy_ + copied * row_pitch_
                              : static_cast<const char*>(c.x) + (image * c.h + oy * c.stride_h) * c.w * pixel_pitch;
      int64_t ox = column0;
      for (int64_t i = 0; i < count; i++) {
        const int kind = i < longer ? 0 : 1;
        const char* from = x + ox * c.stride_w * pixel_pitch;
        runs_[kind].push_back({apart_ ? to : from, row * c.ow + ox, r0, r1});
        for (int pixel = 0; apart_ && pixel < lengths_[kind]; pixel++, to += pitch_)
          copy(to, from + pixel * c.stride_w * pixel_pitch, c.c);
        next_x_.from = from + lengths_[kind] * c.stride_w * pixel_pitch;
        ox += lengths_[kind];
      }
    }
    const int64_t source_bytes = c.c * sizeof(X);
    if (padded_) next_x_.from = static_cast<const char*>(c.x) + row1 * c.stride_h * c.w * source_bytes;
    const int64_t pixels = (row1 - row0) * width, next_pixel = (row1 - 1) * c.ow + column0 + width;
    next_x_.count = pixels * c.stride_h * c.stride_w * source_bytes;
    next_y_ = {static_cast<const char*>(c.y) + next_pixel * c.k * Micro::kOutBytes, pixels * c.k * Micro::kOutBytes};
  }

  // `count` values of x as they are multiplied.
  static void copy(char* to, const char* from, int64_t count) {
    if constexpr (kWidens) {
      widen(reinterpret_cast<In*>(to), reinterpret_cast<const X*>(from), count);
    } else {
      std::memcpy(to, from, count * sizeof(In));
    }
  }

  // The rows that output rows [row0, row1) read, with their padding; those that two of an image share, once.
  void copy_padded(int64_t row0, int64_t row1) {
    const Conv& c = conv_;
    char* to = scratch<0>(((row1 - row0) * std::max(c.r, c.stride_h) + c.r) * row_pitch_);
    copy_ = to;
    const int fill = sizeof(X) == 1 ? c.x_grid.zero_point : 0;
    const int64_t side = c.pad_w * (pixel_bytes_ + gap_), middle = c.w * (pixel_bytes_ + gap_);
    int64_t next = 0;  // the first row of the image that has not been copied
    for (int64_t row = row0; row < row1; row++) {
      const int64_t image = row / c.oh, oy = row % c.oh, top = oy * c.stride_h - c.pad_h;
      if (row == row0 || oy == 0) next = top;
      for (; next < top + c.r; next++, to += row_pitch_) {
        if (next < 0 || next >= c.h) {
          std::memset(to, fill, row_pitch_);
          continue;
        }
        const char* from = static_cast<const char*>(c.x) + (image * c.h + next) * c.w * c.c * sizeof(X);
        std::memset(to, fill, side);
        if (gap_ == 0) copy(to + side, from, c.w * c.c);
        for (int64_t i = 0; gap_ != 0 && i < c.w; i++)
          copy(to + side + i * (pixel_bytes_ + gap_), from + i * c.c * sizeof(X), c.c);
        std::memset(to + side + middle, fill, side);
      }
    }
  }

  Conv conv_;
  bool padded_, apart_;
  int64_t pixel_bytes_, gap_, pitch_, row_pitch_, blocks_, rows_, columns_, across_, panels_;
  int64_t part_rows_, part_words_, parts_;
  const char* copy_ = nullptr;
  Bytes next_x_, next_y_;
  Ahead ahead_;
  int lengths_[2];
  std::vector<Run> runs_[2];
  float* sums_ = nullptr;
};

template <class Algorithm>
constexpr Kernel kernel_of{[](const Conv& conv) { return Algorithm(conv).units(); },
                           [](const Conv& conv, int64_t begin, int64_t end) { Algorithm(conv).run(begin, end); }};

}  // namespace resnet_fused::cpu::RESNET_FUSED_LANES
