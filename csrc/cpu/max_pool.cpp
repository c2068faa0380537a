#include "max_pool.h"

#include <algorithm>
#include <limits>

#include "epilogue.h"

namespace resnet_fused::cpu {
namespace {

// The largest values of up to 16 channels. A NaN stays: the second is returned where either is one, the first where that
// is.
template <class T>
struct Largest {
  static constexpr int64_t kChannels = 16;
  __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());

  explicit Largest(int64_t) {}
  void see(const T* from) {
    const __m512 x = load(from);
    most = _mm512_mask_mov_ps(_mm512_max_ps(most, x), _mm512_cmp_ps_mask(most, most, _CMP_UNORD_Q), most);
  }
  void write(T* to) const { store(to, most, 0); }
};

// Of up to 64 channels in 8 bits, as they are.
template <>
struct Largest<uint8_t> {
  static constexpr int64_t kChannels = 64;
  __mmask64 which;
  __m512i most = {};

  explicit Largest(int64_t left) : which(left < kChannels ? (__mmask64{1} << left) - 1 : ~__mmask64{0}) {}
  void see(const uint8_t* from) { most = _mm512_max_epu8(most, _mm512_maskz_loadu_epi8(which, from)); }
  void write(uint8_t* to) const { _mm512_mask_storeu_epi8(to, which, most); }
};

template <class T>
void run(const MaxPool& p, int64_t begin, int64_t end) {
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

}  // namespace

void avx512::max_pool(const MaxPool& pool, int bytes, int64_t begin, int64_t end) {
  (bytes == 4 ? run<float> : bytes == 2 ? run<BFloat16> : run<uint8_t>)(pool, begin, end);
}

}  // namespace resnet_fused::cpu
