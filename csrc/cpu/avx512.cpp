// The micro-kernel on vector units: a word of x of each of up to 14 pixels, broadcast, by the words of 32 columns.
#include <array>
#include <utility>

#include "epilogue.h"
#include "groups.h"
#include "winograd.h"

namespace resnet_fused::cpu {
namespace {

struct Float32 {
  using In = float;
  using Sum = __m512;
  static Sum add(Sum sum, const Sum* other) { return _mm512_add_ps(sum, _mm512_loadu_ps(other)); }
  static Sum dot(Sum sum, __m512i x, __m512i w) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
  }
};

struct Bfloat16 {
  using In = BFloat16;
  using Sum = __m512;
  static Sum add(Sum sum, const Sum* other) { return _mm512_add_ps(sum, _mm512_loadu_ps(other)); }
  static Sum dot(Sum sum, __m512i x, __m512i w) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
};

struct Int8 {
  using In = uint8_t;
  using Sum = __m512i;
  static Sum add(Sum sum, const Sum* other) { return _mm512_add_epi32(sum, _mm512_loadu_si512(other)); }
  static Sum dot(Sum sum, __m512i x, __m512i w) { return _mm512_dpbusd_epi32(sum, x, w); }
};

// 28 vectors of sums, two of weights and one of x fill the registers.
template <class Product, class Out>
struct Vectors {
  static constexpr int kRun = 7;
  static constexpr int kInBytes = sizeof(typename Product::In), kOutBytes = sizeof(Out), kStepBytes = kWord;
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
    const auto* ahead = w + tile.halves_ahead * (part.r1 - part.r0) * length * (kColumns / 2);
    const auto* next = tile.next ? tile.next : reinterpret_cast<const char*>(w);
    // Between steps some of the results' lines are asked for: all at once would hold up the weights. A block that
    // begins within a line is in one that the block before it asked for.
    constexpr int kPixels = kRuns * kLength;
    const bool fetches = part.last && tile.block * kColumns * sizeof(Out) % 64 == 0;
    const int64_t step = std::min<int64_t>(length, 32), all_steps = (part.r1 - part.r0) * ((length + step - 1) / step);
    int64_t steps = 0, fetched = fetches ? 0 : kPixels;
    Results<Out> results(tile, kLength);
    for (int64_t r = part.r0; r < part.r1; r++) {
      const char* x0 = tile.runs[0].x + r * tile.row_pitch;
      const char* x1 = tile.runs[1].x + r * tile.row_pitch;
      for (int64_t begin = 0; begin < length; begin += step) {
        const int64_t end = std::min(begin + step, length);
        for (steps++; fetched * all_steps < steps * kPixels; fetched++) results.fetch();
        const bool partial = kPartial && part.k0 + end == words;
        const auto multiply_word = [&](int32_t mask) __attribute__((always_inline)) {
          _mm_prefetch(ahead, _MM_HINT_T1);
          _mm_prefetch(next, _MM_HINT_T1);
          __m512i columns[kVectors];
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; j++) columns[j] = _mm512_loadu_si512(w + 16 * j);
#pragma GCC unroll 2
          for (int run = 0; run < kRuns; run++)
#pragma GCC unroll 7
            for (int i = 0; i < kLength; i++) {
              const char* from = (run == 0 ? x0 : x1) + i * pitch;
              const __m512i x = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(from) & mask);
#pragma GCC unroll 2
              for (int j = 0; j < kVectors; j++) sums[run][i][j] = Product::dot(sums[run][i][j], x, columns[j]);
            }
          x0 += kWord;
          x1 += kWord;
          w += kColumns;
          ahead += kColumns / 2;
          next += tile.next_step;
        };
        for (int64_t k = begin; k < end - partial; k++) multiply_word(-1);
        if (partial) multiply_word(0xffff);
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
          if (!part.first) sums[run][i][j] = Product::add(sums[run][i][j], at);
          if (!part.last) _mm512_storeu_si512(at, reinterpret_cast<__m512i>(sums[run][i][j]));
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

}  // namespace

namespace avx512 {
const Kernel float32 = kernel_of<Panels<Vectors<Float32, float>>>;
const Kernel winograd = kernel_of<Winograd<Vectors<Float32, float>>>;
const Kernel bfloat16 = kernel_of<Panels<Vectors<Bfloat16, BFloat16>>>;
const Kernel int8 = kernel_of<Panels<Vectors<Int8, uint8_t>>>;
const Kernel int8_to_float32 = kernel_of<Panels<Vectors<Int8, float>>>;
const Kernel grouped_float32 = kernel_of<Panels<Groups<Float32, float>>>;
const Kernel grouped_bfloat16 = kernel_of<Panels<Groups<Bfloat16, BFloat16>>>;
const Kernel grouped_int8 = kernel_of<Panels<Groups<Int8, uint8_t>>>;
const Kernel grouped_int8_to_float32 = kernel_of<Panels<Groups<Int8, float>>>;
}  // namespace avx512
}  // namespace resnet_fused::cpu
