// The micro-kernel of grouped convolutions: of each pixel of up to two runs a word of its group, by a vector of columns.
#pragma once

#include <array>
#include <utility>

#include "epilogue.h"

namespace resnet_fused::cpu::RESNET_FUSED_LANES {

// The columns of a vector are of one group, or of several whole ones, which then have as many inputs as outputs.
template <class Product, class Out>
struct Groups {
  static constexpr int kRun = kLanes == 16 ? 7 : 5;  // with the weights of three taps they fill the registers
  using X = typename Product::X;
  using In = typename Product::In;
  static constexpr int kInBytes = sizeof(In), kOutBytes = sizeof(Out), kStepBytes = kWord;
  static constexpr int64_t kPartWords = int64_t{1} << 32;  // sums do not leave their registers
  static constexpr bool kByTap = true, kByRow = true;

  void operator()(const Tile& tile, int length, int runs, bool narrow) const {
    const bool several = tile.conv.k / (tile.conv.c / tile.conv.group) < kLanes;
    const bool three_taps = tile.conv.s == 3 && tile.tap_pitch == tile.pitch;
    const Function multiply = kTable[(((length - 1) * 2 + runs - 1) * 2 + several) * 2 + three_taps];
    for (int half = 0; half < (narrow ? 1 : 2); half++) multiply(tile, half);
  }

 private:
  using Function = void (*)(const Tile&, int half);

  // With kTaps taps at once a pixel is read once for all sums that it is in.
  template <int kLength, int kRuns, bool kSeveral, int kTaps>
  static void multiply(const Tile& tile, int half) {
    const Conv& c = tile.conv;
    const int64_t column = tile.block * kColumns + half * kLanes;
    const int64_t words = c.group * kInBytes / kWord, outputs = c.k / (c.c / c.group);
    const int64_t first = column / outputs * c.group * kInBytes;
    const auto* w = static_cast<const int32_t*>(c.weight) +
                    (tile.block * c.r + tile.part.r0) * c.s * words * kColumns + half * kLanes;
    // In each lane the first word of its group: both are powers of two.
    const Ints groups = shift_right(lanes(), __builtin_ctzll(outputs));
    const Ints begin = shift_left(groups, __builtin_ctzll(words));
    typename Product::Sum sums[kRuns][kLength][1] = {};
    for (int64_t r = tile.part.r0; r < tile.part.r1; r++)
      for (int64_t s = 0; s < c.s; s += kTaps, w += (kTaps - 1) * words * kColumns) {
        const int64_t tap = r * tile.row_pitch + s * tile.tap_pitch + first;
        const char *x0 = tile.runs[0].x + tap, *x1 = tile.runs[1].x + tap;
        for (int64_t k = 0; k < words; k++, w += kColumns) {
          Ints weights[kTaps];
#pragma GCC unroll 3
          for (int t = 0; t < kTaps; t++) weights[t] = load_words(w + t * words * kColumns);
          const Ints index = add(begin, set1(static_cast<int>(k)));
#pragma GCC unroll 2
          for (int run = 0; run < kRuns; run++)
#pragma GCC unroll 9
            for (int pixel = 0; pixel < kLength + kTaps - 1; pixel++) {
              const char* from = (run == 0 ? x0 : x1) + pixel * tile.pitch;
              const Ints x = kSeveral ? permute(load_values<kInBytes>(from), index)
                                      : set1(*reinterpret_cast<const int32_t*>(from + k * kWord));
#pragma GCC unroll 3
              for (int t = 0; t < kTaps; t++)
                if (const int i = pixel - t; i >= 0 && i < kLength)
                  sums[run][i][0] = Product::dot(sums[run][i][0], x, weights[t]);
            }
        }
      }
#pragma GCC unroll 2
    for (int run = 0; run < kRuns; run++) finish<Out>(c, tile.runs[run].pixel, column, sums[run]);
  }

  template <size_t... kIndex>
  static constexpr std::array<Function, sizeof...(kIndex)> table(std::index_sequence<kIndex...>) {
    return {multiply<kIndex / 8 + 1, kIndex / 4 % 2 + 1, kIndex / 2 % 2, kIndex % 2 ? 3 : 1>...};
  }
  static constexpr auto kTable = table(std::make_index_sequence<kRun * 8>());
};

}  // namespace resnet_fused::cpu::RESNET_FUSED_LANES
