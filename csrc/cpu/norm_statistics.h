// Means and squared deviations of a batch, and what batch norm makes of them: see norm.h.
#pragma once

#include <cmath>
#include <limits>

#include "norm.h"
#include "norm_vectors.h"

namespace resnet_fused::cpu::RESNET_FUSED_LANES {

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

}  // namespace resnet_fused::cpu::RESNET_FUSED_LANES
