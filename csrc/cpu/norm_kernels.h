// Batch norm in training: see norm.h. Memory is read in its order, which is faster than several wide rows at once. Of
// narrow rows sums take four, whose terms are added in pairs first.
#pragma once

#include "norm_pool.h"
#include "norm_statistics.h"

namespace resnet_fused::cpu::RESNET_FUSED_LANES {

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