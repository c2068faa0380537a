// Batch norm in training: see norm.h. Memory is read in its order, which is faster than several wide rows at once. Of
// narrow rows sums take four, whose terms are added in pairs first.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "lanes.h"
#include "norm.h"

namespace resnet_fused::cpu::RESNET_FUSED_LANES {

inline Floats subtract(Floats a, Floats b) { return a - b; }
inline Floats multiply(Floats a, Floats b) { return a * b; }

// Which lanes a gradient passes.
#ifdef __AVX512F__
using Pass = __mmask16;
inline Pass above_zero(Floats v) { return _mm512_cmp_ps_mask(v, Floats{}, _CMP_NLE_UQ); }  // or a NaN
inline Pass equal(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline Pass wins(Floats v, Floats most) {
  return _mm512_cmp_ps_mask(v, most, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
}
inline Floats select(Pass pass, Floats v) { return _mm512_maskz_mov_ps(pass, v); }
inline Floats choose(Pass pass, Floats v, Floats other) { return _mm512_mask_mov_ps(other, pass, v); }
inline Ints choose(Pass pass, Ints v, Ints other) { return _mm512_mask_mov_epi32(other, pass, v); }
inline uint32_t bits_of(Pass pass) { return pass; }
inline Pass pass_of(uint32_t bits) { return static_cast<Pass>(bits); }
#else
using Pass = __m256i;
inline Pass above_zero(Floats v) { return _mm256_castps_si256(_mm256_cmp_ps(v, Floats{}, _CMP_NLE_UQ)); }  // or a NaN
inline Pass wins(Floats v, Floats most) {
  return _mm256_castps_si256(_mm256_or_ps(_mm256_cmp_ps(v, most, _CMP_GT_OQ), _mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
inline Pass equal(Ints a, Ints b) { return _mm256_cmpeq_epi32(a, b); }
inline Floats select(Pass pass, Floats v) { return _mm256_and_ps(_mm256_castsi256_ps(pass), v); }
inline Floats choose(Pass pass, Floats v, Floats other) {
  return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(pass));
}
inline Ints choose(Pass pass, Ints v, Ints other) { return _mm256_blendv_epi8(other, v, pass); }
inline uint32_t bits_of(Pass pass) { return _mm256_movemask_ps(_mm256_castsi256_ps(pass)); }
inline Pass pass_of(uint32_t bits) {
  const Ints bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(set1(static_cast<int32_t>(bits)), bit), bit);
}
#endif

// The bits of a vector of values, of which the first is a multiple of 8.
inline Pass load_pass(const uint8_t* bits, All) {
  std::conditional_t<kLanes == 16, uint16_t, uint8_t> found;
  std::memcpy(&found, bits, sizeof(found));
  return pass_of(found);
}
inline void store_pass(uint8_t* bits, Pass pass, All) {
  const auto found = static_cast<std::conditional_t<kLanes == 16, uint16_t, uint8_t>>(bits_of(pass));
  std::memcpy(bits, &found, sizeof(found));
}

// The last lanes of all.
struct Last : Some {
  explicit Last(int64_t left) : Some(left), left(left) {}
  int64_t left;
};
inline Pass load_pass(const uint8_t* bits, Last last) {
  return pass_of(bits[0] | (last.left > 8 ? uint32_t{bits[1]} << 8 : 0));
}
inline void store_pass(uint8_t* bits, Pass pass, Last last) {
  const uint32_t found = bits_of(pass) & ((1u << last.left) - 1);
  bits[0] = static_cast<uint8_t>(found);
  if (last.left > 8) bits[1] = static_cast<uint8_t>(found >> 8);
}

// Rounded to T, of which the smallest numbers stay: AVX-512's own conversion to bfloat16 makes them zero.
template <class Which>
inline void write(float* p, Floats v, Which which) {
  store(p, v, which);
}
#ifdef __AVX512F__
inline Ints nearest(Floats v) {
  const Ints bits = _mm512_castps_si512(v), odd = _mm512_and_si512(shift_right(bits, 16), set1(1));
  const Ints rounded = add(add(bits, odd), set1(0x7fff)), quiet = _mm512_or_si512(bits, set1(0x400000));
  return shift_right(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet), 16);
}
inline void write(BFloat16* p, Floats v, All) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(nearest(v)));
}
inline void write(BFloat16* p, Floats v, Some which) {
  _mm256_mask_storeu_epi16(p, which.mask, _mm512_cvtepi32_epi16(nearest(v)));
}
#else
template <class Which>
inline void write(BFloat16* p, Floats v, Which which) {
  store(p, v, which);
}
#endif

// As T holds it.
template <class T>
inline Floats rounded(Floats v) {
  if constexpr (std::is_same_v<T, float>) return v;
#ifdef __AVX512F__
  return _mm512_castsi512_ps(shift_left(nearest(v), 16));
#else
  T values[kLanes];
  store(values, v);
  return load(values);
#endif
}

inline Floats relu_of(Floats v) { return max(Floats{}, v); }  // a NaN stays

// body(number of rows, index of the first, place in it, which lanes), for rows one by one
template <class Body>
[[gnu::always_inline]] inline void for_rows(int64_t width, int64_t begin, int64_t end, Body body) {
  constexpr std::integral_constant<int, 1> one;
  for (int64_t at = begin; at < end; at += width) {
    const int64_t length = std::min(width, end - at);
    int64_t j = 0;
    for (; j + kLanes <= length; j += kLanes) body(one, at + j, j, All{});
    if (j < length) body(one, at + j, j, Last(length - j));
  }
}

// The same for up to four rows at once.
template <class Body>
[[gnu::always_inline]] inline void for_several_rows(int64_t width, int64_t begin, int64_t end, Body body) {
  constexpr int64_t kNarrow = 128;
  constexpr std::integral_constant<int, 4> four;
  int64_t at = begin;
  if (width <= kNarrow)
    for (; at + four * width <= end; at += four * width)
      for (int64_t j = 0; j < width; j += kLanes) body(four, at + j, j, All{});
  for_rows(width, at, end, body);
}

// Lanes that are no values count as zero.
inline Floats inside(Floats v, All) { return v; }
#ifdef __AVX512F__
inline Floats inside(Floats v, Last last) { return select(last.mask, v); }
#else
inline Floats inside(Floats v, Last last) { return select(pass_of((1u << last.count) - 1), v); }
#endif

template <int kRows>
[[gnu::always_inline]] inline Floats sum_of(const Floats (&v)[kRows]) {
  if constexpr (kRows == 4) return add(add(v[0], v[1]), add(v[2], v[3]));
  return v[0];
}

template <class T>
void moments_of(const void* from, const float* center, int64_t width, int64_t begin, int64_t end, float* sums,
                float* squares) {
  const T* x = static_cast<const T*>(from);
  for_several_rows(width, begin, end, [=](auto rows, int64_t at, int64_t j, auto which) __attribute__((always_inline)) {
    const Floats middle = load(center + j);
    Floats v[rows], square[rows];
    for (int i = 0; i < rows; i++) {
      v[i] = inside(subtract(load(x + at + i * width, which), middle), which);
      square[i] = multiply(v[i], v[i]);
    }
    store(sums + j, add(load(sums + j), sum_of<rows>(v)));
    store(squares + j, add(load(squares + j), sum_of<rows>(square)));
  });
}

enum class Added { kNothing, kResidual, kMapped };

template <class T, Added kAdded, bool kRelu, bool kMask>
void apply_as(const NormForward& f, int64_t begin, int64_t end) {
  const T *x = static_cast<const T*>(f.x), *residual = static_cast<const T*>(f.residual);
  T* y = static_cast<T*>(f.y);
  const NormForward a = f;
  for_rows(a.width, begin, end, [=](auto, int64_t at, int64_t j, auto which) __attribute__((always_inline)) {
    Floats v = fmadd(load(x + at, which), load(a.scale + j), load(a.shift + j));
    if constexpr (kAdded == Added::kResidual) v = add(v, load(residual + at, which));
    if constexpr (kAdded == Added::kMapped)
      v = add(v, fmadd(load(residual + at, which), load(a.residual_scale + j), load(a.residual_shift + j)));
    if constexpr (kRelu) v = relu_of(v);
    write(y + at, v, which);
    if constexpr (kMask) store_pass(a.mask + at / 8, above_zero(rounded<T>(v)), which);
  });
}

template <class T, Added kAdded>
void apply_added(const NormForward& f, int64_t begin, int64_t end) {
  if (f.mask != nullptr) return (f.relu ? apply_as<T, kAdded, true, true> : apply_as<T, kAdded, false, true>)(f, begin, end);
  (f.relu ? apply_as<T, kAdded, true, false> : apply_as<T, kAdded, false, false>)(f, begin, end);
}

template <class T>
void apply_of(const NormForward& f, int64_t begin, int64_t end) {
  if (f.residual == nullptr) return apply_added<T, Added::kNothing>(f, begin, end);
  (f.residual_scale == nullptr ? apply_added<T, Added::kResidual> : apply_added<T, Added::kMapped>)(f, begin, end);
}

enum class Gate { kOpen, kBits, kRecomputed };

template <class T, Gate kGate, class Which>
[[gnu::always_inline]] inline Floats gradient(const NormBackward& b, int64_t k, Floats x, Floats scale, Floats shift,
                                              Which which) {
  const Floats dy = load(static_cast<const T*>(b.dy) + k, which);
  if constexpr (kGate == Gate::kBits) return select(load_pass(b.mask + k / 8, which), dy);
  if constexpr (kGate == Gate::kRecomputed) return select(above_zero(rounded<T>(fmadd(x, scale, shift))), dy);
  return dy;
}

template <class T, Gate kGate>
struct BackwardSums {
  static void run(const NormBackward& given, int64_t begin, int64_t end, float* sums, float* products) {
    const NormBackward b = given;
    const T* x = static_cast<const T*>(b.x);
    for_several_rows(b.width, begin, end, [=](auto rows, int64_t at, int64_t j, auto which) __attribute__((always_inline)) {
      const Floats scale = load(b.scale + j), shift = load(b.shift + j), mean = load(b.mean + j);
      Floats dz[rows], product[rows];
      for (int i = 0; i < rows; i++) {
        const int64_t k = at + i * b.width;
        const Floats value = load(x + k, which);
        dz[i] = inside(gradient<T, kGate>(b, k, value, scale, shift, which), which);
        product[i] = inside(multiply(dz[i], subtract(value, mean)), which);
      }
      store(sums + j, add(load(sums + j), sum_of<rows>(dz)));
      store(products + j, add(load(products + j), sum_of<rows>(product)));
    });
  }
};

template <class T, Gate kGate, bool kBatch, bool kWritesDz>
void backward_as(const NormBackward& given, int64_t begin, int64_t end) {
  const NormBackward b = given;
  const T* x = static_cast<const T*>(b.x);
  T *dx = static_cast<T*>(b.dx), *written = static_cast<T*>(b.dz);
  for_rows(b.width, begin, end, [=](auto, int64_t at, int64_t j, auto which) __attribute__((always_inline)) {
    const Floats scale = load(b.scale + j), value = load(x + at, which);
    const Floats dz = gradient<T, kGate>(b, at, value, scale, load(b.shift + j), which);
    if constexpr (kBatch) {
      const Floats centred = subtract(value, load(b.mean + j));
      write(dx + at, fmadd(scale, dz, fmadd(centred, load(b.slope + j), load(b.offset + j))), which);
    } else {
      write(dx + at, multiply(scale, dz), which);
    }
    if constexpr (kWritesDz) write(written + at, dz, which);
  });
}

template <class T, Gate kGate>
struct BackwardApply {
  static void run(const NormBackward& b, int64_t begin, int64_t end) {
    if (b.dz != nullptr)
      return (b.slope ? backward_as<T, kGate, true, true> : backward_as<T, kGate, false, true>)(b, begin, end);
    (b.slope ? backward_as<T, kGate, true, false> : backward_as<T, kGate, false, false>)(b, begin, end);
  }
};

template <class T, template <class, Gate> class Step, class... Rest>
void by_gate(const NormBackward& b, Rest... rest) {
  if (!b.relu) return Step<T, Gate::kOpen>::run(b, rest...);
  (b.mask != nullptr ? Step<T, Gate::kBits>::run : Step<T, Gate::kRecomputed>::run)(b, rest...);
}

template <class T>
void add_of(const void* a, const void* b, bool relu, void* y, int64_t begin, int64_t end) {
  const T *x = static_cast<const T*>(a), *other = static_cast<const T*>(b);
  for_rows(kLanes, begin, end, [=](auto, int64_t at, int64_t, auto which) __attribute__((always_inline)) {
    const Floats v = add(load(x + at, which), load(other + at, which));
    write(static_cast<T*>(y) + at, relu ? relu_of(v) : v, which);
  });
}

template <class T>
void add_backward_of(const void* dy, const void* y, void* dz, int64_t begin, int64_t end) {
  for_rows(kLanes, begin, end, [=](auto, int64_t at, int64_t, auto which) __attribute__((always_inline)) {
    const Pass pass = above_zero(load(static_cast<const T*>(y) + at, which));
    write(static_cast<T*>(dz) + at, select(pass, load(static_cast<const T*>(dy) + at, which)), which);
  });
}

// body(channel, which lanes), over the channels of a pixel
template <class Body>
[[gnu::always_inline]] inline void for_channels(int64_t channels, Body body) {
  int64_t j = 0;
  for (; j + kLanes <= channels; j += kLanes) body(j, All{});
  if (j < channels) body(j, Last(channels - j));
}

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

template <class T>
void center_of(const void* from, int64_t channels, int64_t pixels, float* center) {
  const T* x = static_cast<const T*>(from);
  const int64_t few = std::min<int64_t>(pixels, 4);
  const float share = 1.0f / static_cast<float>(few);
  for (int64_t c = 0; c < channels; c++) center[c] = to_float(x[c]) * share;
  for (int64_t i = 1; i < few; i++)
    for (int64_t c = 0; c < channels; c++) center[c] += to_float(x[i * channels + c]) * share;
  for (int64_t c = 0; c < channels; c++)
    center[c] = std::abs(center[c]) < std::numeric_limits<float>::infinity() ? center[c] : 0;
}

inline bool summarise(double n, int64_t channels, int64_t copies, float* center, float* sums, float* squares,
                      double* mean, float* m2) {
  for (int64_t i = 1; i < copies; i++)
    for (int64_t c = 0; c < channels; c++) {
      sums[c] += sums[i * channels + c];
      squares[c] += squares[i * channels + c];
    }
  const double share = 1 / n;
  int lost = 0;
  for (int64_t c = 0; c < channels; c++) {
    const double sum = sums[c], square = squares[c], rest = square - sum * sum * share;
    mean[c] = center[c] + sum * share;
    m2[c] = static_cast<float>(rest);
    lost |= rest < square / 4;
    center[c] = static_cast<float>(mean[c]);
  }
  return !lost;
}

[[gnu::optimize("no-math-errno")]] inline void finalize(const NormFinalize& f) {
  const double share = 1 / f.count, others = 1 / (f.count - 1);
  for (int64_t c = 0; c < f.channels; c++) {
    const double invstd = 1 / std::sqrt(f.deviations[c] * share + f.eps);
    f.invstd[c] = static_cast<float>(invstd);
    f.mean[c] = static_cast<float>(f.means[c]);
    f.scale[c] = static_cast<float>(f.weight ? invstd * f.weight[c] : invstd);
    f.shift[c] = static_cast<float>((f.bias ? f.bias[c] : 0.0) - f.means[c] * f.scale[c]);
  }
  const double kept = 1 - f.momentum;
  for (int64_t c = 0; f.running_mean && c < f.channels; c++)
    f.running_mean[c] = static_cast<float>(kept * f.running_mean[c] + f.momentum * f.means[c]);
  for (int64_t c = 0; f.running_var && c < f.channels; c++)
    f.running_var[c] = static_cast<float>(kept * f.running_var[c] + f.momentum * (f.deviations[c] * others));
}

inline void accumulate(const float* values, int64_t count, double* total) {
  for (int64_t i = 0; i < count; i++) total[i] += values[i];
}
inline void merge_means(double n, const double* means, int64_t count, double* mean) {
  for (int64_t i = 0; i < count; i++) mean[i] += n * means[i];
}
inline void merge_squares(double n, const double* means, const float* m2s, const double* mean, int64_t count,
                          double* m2) {
  for (int64_t i = 0; i < count; i++) m2[i] += m2s[i] + n * (means[i] - mean[i]) * (means[i] - mean[i]);
}

constexpr NormKernels norm_kernels{
    .moments =
        [](const void* x, int bytes, auto... rest) { (bytes == 4 ? moments_of<float> : moments_of<BFloat16>)(x, rest...); },
    .apply = [](const NormForward& f, int bytes, auto... rest) {
      (bytes == 4 ? apply_of<float> : apply_of<BFloat16>)(f, rest...);
    },
    .backward_sums =
        [](const NormBackward& b, int bytes, auto... rest) {
          (bytes == 4 ? by_gate<float, BackwardSums, decltype(rest)...>
                      : by_gate<BFloat16, BackwardSums, decltype(rest)...>)(b, rest...);
        },
    .backward_apply =
        [](const NormBackward& b, int bytes, auto... rest) {
          (bytes == 4 ? by_gate<float, BackwardApply, decltype(rest)...>
                      : by_gate<BFloat16, BackwardApply, decltype(rest)...>)(b, rest...);
        },
    .add = [](const void* x, const void* other, bool relu, void* y, int bytes, auto... rest) {
      (bytes == 4 ? add_of<float> : add_of<BFloat16>)(x, other, relu, y, rest...);
    },
    .add_backward = [](const void* dy, const void* y, void* dz, int bytes, auto... rest) {
      (bytes == 4 ? add_backward_of<float> : add_backward_of<BFloat16>)(dy, y, dz, rest...);
    },
    .pool = [](const NormPool& p, int bytes, auto... rest) {
      (bytes == 4 ? pool_of<float> : pool_of<BFloat16>)(p, rest...);
    },
    .pool_backward_sums = [](const NormPool& p, int bytes, auto... rest) {
      (bytes == 4 ? pool_backward_sums_of<float> : pool_backward_sums_of<BFloat16>)(p, rest...);
    },
    .pool_backward_apply = [](const NormPool& p, int bytes, auto... rest) {
      (bytes == 4 ? pool_backward_apply_of<float> : pool_backward_apply_of<BFloat16>)(p, rest...);
    },
    .center = [](const void* x, int bytes, auto... rest) {
      (bytes == 4 ? center_of<float> : center_of<BFloat16>)(x, rest...);
    },
    .summarise = summarise,
    .finalize = finalize,
    .accumulate = accumulate,
    .merge_means = merge_means,
    .merge_squares = merge_squares,
};

}  // namespace resnet_fused::cpu::RESNET_FUSED_LANES
