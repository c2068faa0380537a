// The micro-kernel on AMX: up to 16 pixels by 64 bytes of x, by 16 columns, are one product of tiles.
#include "epilogue.h"

namespace resnet_fused::cpu {
namespace {

using namespace avx512;

// The number of a tile is part of its instruction, so that neither a loop nor a template can name it.
#define RESNET_FUSED_MULTIPLY(sum, x, w)        \
  do {                                          \
    if constexpr (kInBytes == 1) {              \
      _tile_dpbusd(sum, x, w);                  \
    } else {                                    \
      _tile_dpbf16ps(sum, x, w);                \
    }                                           \
  } while (false)

struct Bfloat16 {
  using In = BFloat16;
  using Sum = float;
  using Vector = __m512;
};

struct Int8 {
  using In = uint8_t;
  using Sum = int32_t;
  using Vector = __m512i;
};

// Two runs by the two halves of a block of columns: tiles 0 to 3 are sums, 4 and 5 hold x, 6 and 7 weights.
template <class Product, class Out>
class Tiles {
 public:
  using X = typename Product::In;
  using In = typename Product::In;
  static constexpr int kRun = 16;
  static constexpr int kInBytes = sizeof(In), kOutBytes = sizeof(Out), kStepBytes = 64;
  static constexpr int64_t kPartWords = int64_t{1} << 32;  // sums do not leave their tiles
  static constexpr bool kByTap = false, kByRow = false;

  ~Tiles() {
    if (length_ != 0) _tile_release();
  }

  void operator()(const Tile& tile, int length, int runs, bool narrow) {
    configure(length);
    if (runs == 2) {
      narrow ? multiply<2, 1>(tile) : multiply<2, 2>(tile);
    } else {
      narrow ? multiply<1, 1>(tile) : multiply<1, 2>(tile);
    }
  }

 private:
  void configure(int length) {
    if (length == length_) return;
    length_ = length;
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {0, 0, 0, 0, 0, 0, 16, 16};
    } tiles;
    static_assert(sizeof(tiles) == 64);
    std::fill_n(tiles.rows, 6, static_cast<uint8_t>(length));
    _tile_loadconfig(&tiles);
  }

  template <int kLines>
  static void fetch(const char* from) {
#pragma GCC unroll 32
    for (int line = 0; line < kLines; line++) _mm_prefetch(from + 64 * line, _MM_HINT_T1);
  }

  template <int kRuns, int kHalves>
  void multiply(const Tile& tile) {
    const Conv& conv = tile.conv;
    Results<Out> results(tile, length_);
    for (int i = 0; i < kRuns * length_; i++) results.fetch();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    constexpr int64_t kStep = 16 * kColumns * kWord;  // bytes of weights that 64 bytes of x meet
    const int64_t steps = conv.s * conv.c * kInBytes / 64;
    const auto* w = static_cast<const char*>(conv.weight) + tile.block * conv.r * steps * kStep;
    const auto* ahead = w + (2 + tile.slice) * conv.r * steps * (kStep / 2);
    const auto* next = tile.next;
    for (int64_t r = 0; r < conv.r; r++) {
      const char *x0 = tile.runs[0].x + r * tile.row_pitch, *x1 = tile.runs[1].x + r * tile.row_pitch;
      for (int64_t k = 0; k < steps; k++) {
        _tile_loadd(6, w, kColumns * kWord);
        _tile_loadd(4, x0 + 64 * k, tile.pitch);
        RESNET_FUSED_MULTIPLY(0, 4, 6);
        if constexpr (kHalves == 2) {
          _tile_loadd(7, w + 64, kColumns * kWord);
          RESNET_FUSED_MULTIPLY(1, 4, 7);
        }
        if constexpr (kRuns == 2) {
          _tile_loadd(5, x1 + 64 * k, tile.pitch);
          RESNET_FUSED_MULTIPLY(2, 5, 6);
          if constexpr (kHalves == 2) RESNET_FUSED_MULTIPLY(3, 5, 7);
        }
        if (tile.slices != 0) fetch<16>(ahead);
        for (int line = 0; next && line < tile.next_step; line += 64) _mm_prefetch(next + line, _MM_HINT_T1);
        w += kStep;
        ahead += kStep / 2;
        next += tile.next_step;
      }
    }
    constexpr int64_t kRow = sizeof(sums_[0]);
    _tile_stored(0, &sums_[0][0], kRow);
    if constexpr (kHalves == 2) _tile_stored(1, &sums_[0][16], kRow);
    if constexpr (kRuns == 2) _tile_stored(2, &sums_[kRun][0], kRow);
    if constexpr (kRuns == 2 && kHalves == 2) _tile_stored(3, &sums_[kRun][16], kRow);
    for (int run = 0; run < kRuns; run++)
      for (int i = 0; i < length_; i++) {
        typename Product::Vector sums[1][kHalves];
        std::memcpy(sums, sums_[run * kRun + i], sizeof(sums));
        finish<Out>(conv, tile.runs[run].pixel + i, tile.block * kColumns, sums);
      }
  }

  int length_ = 0;  // of the runs that the tiles are configured for
  alignas(64) typename Product::Sum sums_[2 * kRun][kColumns];
};

}  // namespace

const Algorithm amx_tiles{
    .bfloat16 = kernel_of<Panels<Tiles<Bfloat16, BFloat16>>>,
    .int8 = kernel_of<Panels<Tiles<Int8, uint8_t>>>,
    .int8_to_float32 = kernel_of<Panels<Tiles<Int8, float>>>,
};
}  // namespace resnet_fused::cpu
