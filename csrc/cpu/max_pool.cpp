#include "max_pool.h"

#include <algorithm>
#include <limits>

#include "epilogue.h"

namespace resnet_fused::cpu {
namespace {

// Returns the second where either is a NaN, and the first where that one is.
__m512 largest(__m512 a, __m512 b) {
  return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}

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
      for (int64_t channel = 0; channel < p.c; channel += 16) {
        __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (int64_t iy = iy0; iy < iy1; iy++)
          for (int64_t ix = ix0; ix < ix1; ix++)
            most = largest(most, load(x + ((image + iy) * p.w + ix) * p.c + channel));
        store(to + channel, most, 0);
      }
    }
  }
}

}  // namespace

void avx512::max_pool(const MaxPool& pool, int bytes, int64_t begin, int64_t end) {
  (bytes == 4 ? run<float> : bytes == 2 ? run<BFloat16> : run<uint8_t>)(pool, begin, end);
}

}  // namespace resnet_fused::cpu
