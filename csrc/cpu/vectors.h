// The micro-kernel on vector units: a word of x of each pixel of up to two runs, broadcast, by the words of a block of
// columns.
#pragma once

#include <array>
#include <utility>

#include "epilogue.h"

namespace resnet_fused::cpu::RESNET_FUSED_LANES {

// A product: X, the type of x, and In, the one it is multiplied in.
struct Float32 {
  using X = float;
  using In = float;
  using Sum = Floats;
  static Sum dot(Sum sum, Ints x, Ints w) {
#ifdef __AVX512F__
    return fmadd(reinterpret_cast<Floats>(x), reinterpret_cast<Floats>(w), sum);
#else
    asm("vfmadd231ps %1, %2, %0" : "+x"(sum) : "x"(x), "x"(w));  // GCC's choice of registers spills sums of 12
    return sum;
#endif
  }
};

#ifdef __AVX512F__
struct Bfloat16 {
  using X = BFloat16;
  using In = BFloat16;
  using Sum = Floats;
  static Sum dot(Sum sum, Ints x, Ints w) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
};

struct Int8 {
  using X = uint8_t;
  using In = uint8_t;
  using Sum = Ints;
  static Sum dot(Sum sum, Ints x, Ints w) { return _mm512_dpbusd_epi32(sum, x, w); }
};
#else
struct Bfloat16 : Float32 {
  using X = BFloat16;
};
#endif

// 28 vectors of sums with AVX-512, 12 with AVX2, two of weights and one of x fill the registers.
template <class Product, class Out>
struct Vectors {
  static constexpr int kRun = kLanes == 16 ? 7 : 3;
  using X = typename Product::X;
  using In = typename Product::In;
  static constexpr int kInBytes = sizeof(In), kOutBytes = sizeof(Out), kStepBytes = kWord;
  static constexpr int kWords = kLanes == 16 ? 1 : 8;  // at once: products of 8 lanes leave less time for all the rest
  static constexpr int64_t kPartWords = 512;  // longer sums lose digits
  static constexpr bool kByTap = false, kByRow = true;

  void operator()(const Tile& tile, int length, int runs, bool narrow) const {
    const bool partial = kInBytes == 2 && tile.conv.s * tile.conv.c % 2 != 0;
    kTable[(((length - 1) * 2 + runs - 1) * 2 + narrow) * 2 + partial](tile);
  }

 private:
  using Function = void (*)(const Tile&);

  // With kPartial half of a filter row's last word is of the next row: its weights are zeros, which do not hide a NaN.
  template <int kLength, int kRuns, int kVectors, bool kPartial>
  static void multiply(const Tile& tile) {
    typename Product::Sum sums[kRuns][kLength][kVectors] = {};
    const Conv& conv = tile.conv;
    const Part& part = tile.part;
    const int64_t words = ceil_div(conv.s * conv.c * kInBytes, kWord), length = part.k1 - part.k0, pitch = tile.pitch;
    const auto* w = static_cast<const int32_t*>(conv.weight) +
                    ((tile.block * conv.r + part.r0) * words + part.k0) * kColumns;
    const int64_t bytes = (part.r1 - part.r0) * length * kColumns * kWord;
    const auto* ahead = reinterpret_cast<const char*>(w) + (tile.slices ? bytes + tile.slice * bytes / tile.slices : 0);
    const int64_t ahead_step = tile.slices ? ceil_div(kColumns * kWord, tile.slices) : 0;
    const auto* next = tile.next ? tile.next : reinterpret_cast<const char*>(w);
    // Between steps some of the results' lines are asked for: all at once would hold up the weights. A block that
    // begins within a line is in one that the block before it asked for. Lines of 8 bits come in time by themselves.
    constexpr int kPixels = kRuns * kLength;
    constexpr bool kFetches = sizeof(Out) != 1;
    const bool fetches = part.last && tile.block * kColumns * sizeof(Out) % 64 == 0;
    constexpr int64_t kStep = 32;
    const int64_t all_steps = (part.r1 - part.r0) * ceil_div(length, kStep);
    int64_t steps = 0, fetched = fetches ? 0 : kPixels;
    Results<Out> results(tile, kLength);
    for (int64_t r = part.r0; r < part.r1; r++) {
      const char* x0 = tile.runs[0].x + r * tile.row_pitch;
      const char* x1 = tile.runs[1].x + r * tile.row_pitch;
      for (int64_t begin = 0; begin < length; begin += kStep) {
        const int64_t end = std::min(begin + kStep, length);
        for (steps++; kFetches && fetched * all_steps < steps * kPixels; fetched++) results.fetch();
        const bool partial = kPartial && part.k0 + end == words;
        const auto multiply_word = [&](int word, int32_t mask) __attribute__((always_inline)) {
          Ints columns[kVectors];
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; j++) columns[j] = load_words(w + word * kColumns + kLanes * j);
#pragma GCC unroll 2
          for (int run = 0; run < kRuns; run++)
#pragma GCC unroll 7
            for (int i = 0; i < kLength; i++) {
              const char* from = (run == 0 ? x0 : x1) + i * pitch + word * kWord;
              const Ints x = set1(*reinterpret_cast<const int32_t*>(from) & mask);
#pragma GCC unroll 2
              for (int j = 0; j < kVectors; j++) sums[run][i][j] = Product::dot(sums[run][i][j], x, columns[j]);
            }
        };
        const auto fetch_and_advance = [&](int count) __attribute__((always_inline)) {
          _mm_prefetch(ahead, _MM_HINT_T1);
          _mm_prefetch(next, _MM_HINT_T1);
          for (int64_t byte = 64; byte < count * ahead_step; byte += 64) _mm_prefetch(ahead + byte, _MM_HINT_T1);
          for (int64_t byte = 64; count > 1 && byte < count * tile.next_step; byte += 64)
            _mm_prefetch(next + byte, _MM_HINT_T1);
          x0 += count * kWord;
          x1 += count * kWord;
          w += count * kColumns;
          ahead += count * ahead_step;
          next += count * tile.next_step;
        };
        int64_t k = begin;
        for (; k + kWords <= end - partial; k += kWords) {
#pragma GCC unroll 8
          for (int word = 0; word < kWords; word++) multiply_word(word, -1);
          fetch_and_advance(kWords);
        }
        for (; k < end - partial; k++) {
          multiply_word(0, -1);
          fetch_and_advance(1);
        }
        if (partial) {
          multiply_word(0, 0xffff);
          fetch_and_advance(1);
        }
      }
    }
    auto* before = reinterpret_cast<typename Product::Sum*>(tile.sums);
#pragma GCC unroll 2
    for (int run = 0; run < kRuns; run++) {
#pragma GCC unroll 7
      for (int i = 0; i < kLength; i++)
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; j++) {
          auto* at = before + (run * kLength + i) * kVectors + j;
          if (!part.first) sums[run][i][j] = add(sums[run][i][j], *at);
          if (!part.last) store_words(at, reinterpret_cast<Ints>(sums[run][i][j]));
        }
      if (part.last) finish<Out>(conv, tile.runs[run].pixel, tile.block * kColumns, sums[run]);
    }
  }

  template <size_t... kIndex>
  static constexpr std::array<Function, sizeof...(kIndex)> table(std::index_sequence<kIndex...>) {
    return {multiply<kIndex / 8 + 1, kIndex / 4 % 2 + 1, 2 - kIndex / 2 % 2, kIndex % 2 && kInBytes == 2>...};
  }
  static constexpr auto kTable = table(std::make_index_sequence<kRun * 8>());
};

}  // namespace resnet_fused::cpu::RESNET_FUSED_LANES
