// The operands of batch norm's operators: checks, memory, and the split among threads. How sums are split depends on
// sizes alone, so that they do not change with the number of threads.
#pragma once

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "conv.h"
#include "tensors.h"

namespace resnet_fused::cpu {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr int64_t kLanes = 16;             // that every width is a multiple of
constexpr int64_t kSummed = 32768;         // values that one thread sums in float32, which stay in its cache
constexpr int64_t kChunk = 16384;          // values between which a thread may change direction

inline const NormKernels& kernels() { return other_kernels()->norm; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline std::string text(const Tensor& t) {
  std::string out = std::string(torch::headeronly::toString(t.scalar_type())) + " [";
  for (int d = 0; d < t.dim(); d++) out += (d ? ", " : "") + std::to_string(t.size(d));
  out += "] with strides [";
  for (int d = 0; d < t.dim(); d++) out += (d ? ", " : "") + std::to_string(t.stride(d));
  return out + "]";
}

// An activation, and the rows in which the kernels read it.
struct Activation {
  int64_t pixels, channels, copies, width;
  int bytes;

  Activation(const char* op, const Tensor& x) {
    STD_TORCH_CHECK(other_kernels() != nullptr, op, ": no kernel runs on this CPU");
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
                    ": activations must be Float or BFloat16, got ", text(x));
    STD_TORCH_CHECK(x.dim() == 4 && is_nhwc(x), op, ": activations must be 4-D and dense in NHWC order, got ", text(x));
    bytes = bytes_of(dtype);
    channels = x.size(1);
    pixels = x.size(0) * x.size(2) * x.size(3);
    copies = channels % kLanes == 0 ? 1 : kLanes;
    width = copies * channels;
  }

  int64_t values() const { return pixels * channels; }
  int64_t rows() const { return ceil_div(pixels, copies); }

  // A vector as rows read it.
  Floats repeated(const float* vector) const {
    Floats all(width);
    for (int64_t i = 0; i < copies; i++) std::copy_n(vector, channels, all.begin() + i * channels);
    return all;
  }

  // run(begin, end) of all values, by threads. The last ones first: the pass before has just read them.
  template <class Run>
  void split(Run run) const {
    const int64_t step = std::max<int64_t>(kChunk / std::max<int64_t>(width, 1), 1);
    torch::stable::parallel_for(0, rows(), step, [&](int64_t begin, int64_t end) {
      for (int64_t stop = end; stop > begin; stop -= step) {
        const int64_t start = std::max(begin, stop - step);
        run(start * width, std::min(stop * width, values()));
      }
    });
  }
};

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  bool same = t.dim() == 4 && t.scalar_type() == x.scalar_type() && is_nhwc(t);
  for (int d = 0; same && d < 4; d++) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, op, ": ", name, " must be like x, ", text(x), ", in NHWC order; got ", text(t));
}

inline const float* vector_of(const char* op, const char* name, const Tensor& t, int64_t channels) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels && t.scalar_type() == ScalarType::Float && t.is_contiguous(), op,
                  ": ", name, " must be a contiguous Float vector of ", channels, ", got ", text(t));
  return static_cast<const float*>(t.const_data_ptr());
}

inline const uint8_t* bits_of(const char* op, const OptionalTensor& mask, int64_t values) {
  if (!mask) return nullptr;
  const bool fits = mask->dim() == 1 && mask->size(0) == ceil_div(values, 8) && mask->is_contiguous() &&
                    mask->scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(fits, op, ": mask must be contiguous Byte [", ceil_div(values, 8), "], got ", text(*mask));
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype = ScalarType::Float) {
  return torch::stable::empty(sizes, dtype);
}

inline Tensor kept_like(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  return kept({sizes.begin(), sizes.end()}, {strides.begin(), strides.end()}, x.scalar_type());
}

// The vectors of a batch norm's backward, as rows read them.
struct Vectors {
  Floats scale, shift, mean, slope, offset;

  Vectors(const char* op, const Activation& a, const Tensor& scales, const Tensor& shifts, const Tensor& means)
      : scale(a.repeated(vector_of(op, "scale", scales, a.channels))),
        shift(a.repeated(vector_of(op, "shift", shifts, a.channels))),
        mean(a.repeated(vector_of(op, "mean", means, a.channels))) {}

  // dx as an affine map; without sums the statistics were constants.
  void close(const char* op, const Activation& a, const Tensor& invstds, const OptionalTensor& sum_dy,
             const OptionalTensor& sum_dy_xhat, double count) {
    STD_TORCH_CHECK(sum_dy.has_value() == sum_dy_xhat.has_value(), op, ": sum_dy and sum_dy_xhat come together");
    const float* invstd = vector_of(op, "invstd", invstds, a.channels);
    if (!sum_dy) return;
    const float* sums = vector_of(op, "sum_dy", *sum_dy, a.channels);
    const float* products = vector_of(op, "sum_dy_xhat", *sum_dy_xhat, a.channels);
    Floats slopes(a.channels), offsets(a.channels);
    for (int64_t c = 0; c < a.channels; c++) {
      const double factor = -static_cast<double>(scale[c]) / count;
      slopes[c] = static_cast<float>(factor * products[c] * invstd[c]);
      offsets[c] = static_cast<float>(factor * sums[c]);
    }
    slope = a.repeated(slopes.data()), offset = a.repeated(offsets.data());
  }
  const float* or_null(const Floats& v) const { return v.empty() ? nullptr : v.data(); }
};

// The two sums over parts of [0, units) that run(begin, end, sums, products) forms, `width` values each.
template <class Run>
std::tuple<Tensor, Tensor> summed(const char* op, const Activation& a, const Tensor& invstds, int64_t width, int64_t units,
                                  int64_t step, Run run) {
  const float* invstd = vector_of(op, "invstd", invstds, a.channels);
  const int64_t parts = ceil_div(units, step);
  Floats partial(parts * 2 * width);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      float* const sums = &partial[i * 2 * width];
      run(i * step, std::min((i + 1) * step, units), sums, sums + width);
    }
  });
  const Tensor sum_dy = empty({a.channels}), sum_dy_xhat = empty({a.channels});
  Doubles total(2 * width);
  for (int64_t i = 0; i < parts; i++) kernels().accumulate(&partial[i * 2 * width], 2 * width, total.data());
  for (int64_t c = 0; c < a.channels; c++) {
    double sums = 0, products = 0;
    for (int64_t i = c; i < width; i += a.channels) sums += total[i], products += total[width + i];
    data<float>(sum_dy)[c] = static_cast<float>(sums);
    data<float>(sum_dy_xhat)[c] = static_cast<float>(products * invstd[c]);
  }
  return {sum_dy, sum_dy_xhat};
}

}  // namespace resnet_fused::cpu
