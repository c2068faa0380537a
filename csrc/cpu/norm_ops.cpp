// Batch norm in training as operators, with the schemas of the CUDA ones: checks, memory, and the split among threads.
// How sums are split depends on sizes alone, so that they do not change with the number of threads.
#include <algorithm>
#include <bit>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "conv.h"
#include "memory.h"

namespace resnet_fused::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr int64_t kLanes = 16;             // that every width is a multiple of
constexpr int64_t kSummed = 32768;         // values that one thread sums in float32, which stay in its cache
constexpr int64_t kChunk = 16384;          // values between which a thread may change direction

const NormKernels& kernels() { return other_kernels()->norm; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string text(const Tensor& t) {
  std::string out = std::string(torch::headeronly::toString(t.scalar_type())) + " [";
  for (int d = 0; d < t.dim(); d++) out += (d ? ", " : "") + std::to_string(t.size(d));
  out += "] with strides [";
  for (int d = 0; d < t.dim(); d++) out += (d ? ", " : "") + std::to_string(t.stride(d));
  return out + "]";
}

bool is_nhwc(const Tensor& t) {
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
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
    bytes = dtype == ScalarType::Float ? 4 : 2;
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

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  bool same = t.dim() == 4 && t.scalar_type() == x.scalar_type() && is_nhwc(t);
  for (int d = 0; same && d < 4; d++) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, op, ": ", name, " must be like x, ", text(x), ", in NHWC order; got ", text(t));
}

const float* vector_of(const char* op, const char* name, const Tensor& t, int64_t channels) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == channels && t.scalar_type() == ScalarType::Float && t.is_contiguous(), op,
                  ": ", name, " must be a contiguous Float vector of ", channels, ", got ", text(t));
  return static_cast<const float*>(t.const_data_ptr());
}

const uint8_t* bits_of(const char* op, const OptionalTensor& mask, int64_t values) {
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

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype = ScalarType::Float) {
  return torch::stable::empty(sizes, dtype);
}

// A large result, in memory that is kept: asking the system for its pages costs as much as the pass that fills them.
Tensor kept(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) {
  int64_t bytes = dtype == ScalarType::Float ? 4 : dtype == ScalarType::BFloat16 ? 2 : 1;
  for (const int64_t size : sizes) bytes *= size;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(take(std::max<int64_t>(bytes, 1)), sizes, strides, cpu, dtype, give_back);
}

Tensor kept_like(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  return kept({sizes.begin(), sizes.end()}, {strides.begin(), strides.end()}, x.scalar_type());
}

// ---- statistics ------------------------------------------------------------------------------------------------------

// Mean and sum of squared deviations of pixels [begin, end), by the sums of their differences from the mean of the first
// few. Where that is far from the mean of all, so that digits are lost, once more by those from the latter.
void summarise(const Activation& a, const char* x, int64_t begin, int64_t end, double* mean, float* m2) {
  Floats scratch(3 * a.width);
  float *const center = scratch.data(), *const sums = center + a.width, *const squares = sums + a.width;
  const char* const from = x + begin * a.channels * a.bytes;
  kernels().center(from, a.bytes, a.channels, end - begin, center);
  for (int attempt = 0; attempt < 2; attempt++) {
    for (int64_t i = 1; i < a.copies; i++) std::copy_n(center, a.channels, center + i * a.channels);
    if (attempt > 0) std::fill_n(sums, 2 * a.width, 0.0f);
    kernels().moments(from, a.bytes, center, a.width, 0, (end - begin) * a.channels, sums, squares);
    const auto pixels = static_cast<double>(end - begin);
    if (kernels().summarise(pixels, a.channels, a.copies, center, sums, squares, mean, m2)) return;
  }
}

// Summaries of `count` sets of pixels, of n[i] each, as one.
void merge(const double* n, const double* means, const float* m2s, int64_t count, int64_t channels, double* mean,
           double* m2) {
  double total = 0;
  std::fill_n(mean, channels, 0.0);
  std::fill_n(m2, channels, 0.0);
  for (int64_t i = 0; i < count; i++) {
    total += n[i];
    if (n[i] > 0) kernels().merge_means(n[i], means + i * channels, channels, mean);
  }
  for (int64_t c = 0; c < channels; c++) mean[c] *= 1 / total;
  for (int64_t i = 0; i < count; i++)
    if (n[i] > 0) kernels().merge_squares(n[i], means + i * channels, m2s + i * channels, mean, channels, m2);
}

std::tuple<Tensor, Tensor, Tensor> bn_stats(const Tensor& x, int64_t rows) {
  const Activation a("bn_stats", x);
  STD_TORCH_CHECK(rows >= 1, "bn_stats: a reduction needs at least one row, got rows=", rows);
  const Tensor mean = empty({rows, a.channels}, ScalarType::Double), m2 = empty({rows, a.channels}),
               count = empty({rows});
  // Each row in parts of which a thread's cache holds one.
  const int64_t chunk = ceil_div(a.pixels, rows);
  const int64_t parts = std::max<int64_t>(ceil_div(chunk * a.channels, kSummed), 1), part = ceil_div(chunk, parts);
  Doubles means(parts > 1 ? rows * parts * a.channels : 0), n(rows * parts);
  Floats m2s(means.size());
  double* const part_means = parts > 1 ? means.data() : data<double>(mean);
  float* const part_m2s = parts > 1 ? m2s.data() : data<float>(m2);
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  torch::stable::parallel_for(0, rows * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t start = i / parts * chunk, stop = std::min(start + chunk, a.pixels);
      const int64_t begin = start + i % parts * part, end = std::min(begin + part, stop);
      n[i] = static_cast<double>(std::max<int64_t>(end - begin, 0));
      if (begin < end) {
        summarise(a, from, begin, end, part_means + i * a.channels, part_m2s + i * a.channels);
      } else {
        std::fill_n(part_means + i * a.channels, a.channels, 0.0);
        std::fill_n(part_m2s + i * a.channels, a.channels, 0.0f);
      }
    }
  });
  Doubles merged(a.channels);
  for (int64_t row = 0; row < rows; row++) {
    double total = 0;
    for (int64_t i = 0; i < parts; i++) total += n[row * parts + i];
    data<float>(count)[row] = static_cast<float>(total);
    double* const row_mean = data<double>(mean) + row * a.channels;
    if (parts == 1 || total == 0) {
      if (parts > 1) std::fill_n(row_mean, a.channels, 0.0), std::fill_n(data<float>(m2) + row * a.channels, a.channels, 0.0f);
      continue;
    }
    const int64_t at = row * parts * a.channels;
    merge(&n[row * parts], &means[at], &m2s[at], parts, a.channels, row_mean, merged.data());
    std::copy(merged.begin(), merged.end(), data<float>(m2) + row * a.channels);
  }
  return {mean, m2, count};
}

float widened(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

uint16_t narrowed(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  return static_cast<uint16_t>((std::isnan(v) ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A batch norm's parameter or running statistic as contiguous float32, which it may be already.
class Parameter {
 public:
  Parameter(const char* name, const OptionalTensor& t, int64_t channels) {
    if (!t) return;
    const bool wide = t->scalar_type() == ScalarType::Float;
    const bool fits = t->dim() == 1 && t->size(0) == channels && (wide || t->scalar_type() == ScalarType::BFloat16);
    STD_TORCH_CHECK(fits, "bn_finalize: ", name, " must be a Float or BFloat16 vector of ", channels, ", got ", text(*t));
    at_ = static_cast<float*>(t->mutable_data_ptr());
    if (wide && t->is_contiguous()) return;
    original_ = &*t;
    values_.resize(channels);
    for (int64_t c = 0; c < channels; c++) values_[c] = wide ? at_[c * t->stride(0)] : widened(halves()[c * t->stride(0)]);
    at_ = values_.data();
  }
  float* get() const { return at_; }
  void write_back() const {
    if (original_ == nullptr) return;
    const int64_t stride = original_->stride(0);
    for (size_t c = 0; c < values_.size(); c++) {
      if (original_->scalar_type() == ScalarType::Float) {
        data<float>(*original_)[c * stride] = values_[c];
      } else {
        halves()[c * stride] = narrowed(values_[c]);
      }
    }
  }

 private:
  uint16_t* halves() const { return data<uint16_t>(*original_); }

  float* at_ = nullptr;
  const Tensor* original_ = nullptr;
  Floats values_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_finalize(const Tensor& mean, const Tensor& m2, const Tensor& count,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       const OptionalTensor& running_mean,
                                                       const OptionalTensor& running_var, double momentum, double eps) {
  STD_TORCH_CHECK(mean.dim() == 2 && mean.scalar_type() == ScalarType::Double && mean.is_contiguous(),
                  "bn_finalize: mean must be contiguous Double [rows, C], got ", text(mean));
  const int64_t rows = mean.size(0), channels = mean.size(1);
  STD_TORCH_CHECK(m2.dim() == 2 && m2.size(0) == rows && m2.size(1) == channels && m2.is_contiguous() &&
                      m2.scalar_type() == ScalarType::Float,
                  "bn_finalize: m2 must be contiguous Float [", rows, ", ", channels, "], got ", text(m2));
  const float* counts = vector_of("bn_finalize", "count", count, rows);
  const Parameter weights("weight", weight, channels), biases("bias", bias, channels),
      means("running_mean", running_mean, channels), variances("running_var", running_var, channels);
  const Doubles n(counts, counts + rows);
  Doubles merged(channels), deviations(channels);
  merge(n.data(), static_cast<const double*>(mean.const_data_ptr()), static_cast<const float*>(m2.const_data_ptr()), rows,
        channels, merged.data(), deviations.data());
  double total = 0;
  for (const double one : n) total += one;
  const Tensor scale = empty({channels}), shift = empty({channels}), save_mean = empty({channels}),
               save_invstd = empty({channels});
  kernels().finalize({.channels = channels, .count = total, .momentum = momentum, .eps = eps, .means = merged.data(),
                      .deviations = deviations.data(), .weight = weights.get(), .bias = biases.get(),
                      .running_mean = means.get(), .running_var = variances.get(), .scale = data<float>(scale),
                      .shift = data<float>(shift), .mean = data<float>(save_mean), .invstd = data<float>(save_invstd)});
  means.write_back();
  variances.write_back();
  return {scale, shift, save_mean, save_invstd};
}

// ---- forward ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> bn_apply(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                    const OptionalTensor& residual, const OptionalTensor& residual_scale,
                                    const OptionalTensor& residual_shift, bool relu, bool with_mask) {
  const char* const op = "bn_apply";
  const Activation a(op, x);
  STD_TORCH_CHECK(residual_scale.has_value() == residual_shift.has_value() && (residual || !residual_scale), op,
                  ": residual_scale and residual_shift come together, and with a residual");
  const Floats scales = a.repeated(vector_of(op, "scale", scale, a.channels)),
               shifts = a.repeated(vector_of(op, "shift", shift, a.channels));
  NormForward f{.width = a.width, .x = x.const_data_ptr(), .scale = scales.data(), .shift = shifts.data(), .relu = relu};
  Floats residual_scales, residual_shifts;
  if (residual) {
    check_like(op, "residual", *residual, x);
    f.residual = residual->const_data_ptr();
  }
  if (residual_scale) {
    residual_scales = a.repeated(vector_of(op, "residual_scale", *residual_scale, a.channels));
    residual_shifts = a.repeated(vector_of(op, "residual_shift", *residual_shift, a.channels));
    f.residual_scale = residual_scales.data(), f.residual_shift = residual_shifts.data();
  }
  const Tensor y = kept_like(x);
  const Tensor mask = empty({with_mask ? ceil_div(a.values(), 8) : 0}, ScalarType::Byte);
  f.y = y.mutable_data_ptr();
  f.mask = with_mask ? data<uint8_t>(mask) : nullptr;
  a.split([&](int64_t begin, int64_t end) { kernels().apply(f, a.bytes, begin, end); });
  return {y, mask};
}

// ---- backward --------------------------------------------------------------------------------------------------------

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

NormBackward backward_of(const char* op, const Activation& a, const Tensor& dy, const Tensor& x,
                         const OptionalTensor& mask, const Vectors& v, bool relu) {
  check_like(op, "dy", dy, x);
  return {.width = a.width, .dy = dy.const_data_ptr(), .x = x.const_data_ptr(), .mask = bits_of(op, mask, a.values()),
          .scale = v.scale.data(), .shift = v.shift.data(), .mean = v.mean.data(), .slope = v.or_null(v.slope),
          .offset = v.or_null(v.offset), .relu = relu};
}

std::tuple<Tensor, Tensor> bn_backward_reduce(const Tensor& dy, const Tensor& x, const OptionalTensor& mask,
                                              const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                              const Tensor& invstd, bool relu, int64_t rows) {
  const char* const op = "bn_backward_reduce";
  const Activation a(op, x);
  STD_TORCH_CHECK(rows >= 1, op, ": a reduction needs at least one row, got rows=", rows);
  const Vectors v(op, a, scale, shift, mean);
  const NormBackward b = backward_of(op, a, dy, x, mask, v, relu);
  const int64_t step = std::max<int64_t>(kSummed / std::max<int64_t>(a.width, 1), 1);
  return summed(op, a, invstd, a.width, a.rows(), step, [&](int64_t begin, int64_t end, float* sums, float* products) {
    kernels().backward_sums(b, a.bytes, begin * a.width, std::min(end * a.width, a.values()), sums, products);
  });
}

std::tuple<Tensor, Tensor> bn_backward_apply(const Tensor& dy, const Tensor& x, const OptionalTensor& mask,
                                             const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                             const Tensor& invstd, const OptionalTensor& sum_dy,
                                             const OptionalTensor& sum_dy_xhat, double count, bool relu,
                                             bool with_dresidual) {
  const char* const op = "bn_backward_apply";
  const Activation a(op, x);
  Vectors v(op, a, scale, shift, mean);
  v.close(op, a, invstd, sum_dy, sum_dy_xhat, count);
  NormBackward b = backward_of(op, a, dy, x, mask, v, relu);
  const Tensor dx = kept_like(x);
  const Tensor dz = with_dresidual ? kept_like(x) : empty({0}, x.scalar_type());
  b.dx = dx.mutable_data_ptr();
  b.dz = with_dresidual ? dz.mutable_data_ptr() : nullptr;
  a.split([&](int64_t begin, int64_t end) { kernels().backward_apply(b, a.bytes, begin, end); });
  return {dx, dz};
}

// ---- the residual join -----------------------------------------------------------------------------------------------

Tensor add_act(const Tensor& x, const Tensor& other, bool relu) {
  const Activation a("add_act", x);
  check_like("add_act", "other", other, x);
  const Tensor y = kept_like(x);
  const void *from = x.const_data_ptr(), *added = other.const_data_ptr();
  void* to = y.mutable_data_ptr();
  a.split([&](int64_t begin, int64_t end) { kernels().add(from, added, relu, to, a.bytes, begin, end); });
  return y;
}

Tensor add_act_backward(const Tensor& dy, const Tensor& y) {
  const Activation a("add_act_backward", dy);
  check_like("add_act_backward", "y", y, dy);
  const Tensor dz = kept_like(y);
  const void *from = dy.const_data_ptr(), *result = y.const_data_ptr();
  void* to = dz.mutable_data_ptr();
  a.split([&](int64_t begin, int64_t end) { kernels().add_backward(from, result, to, a.bytes, begin, end); });
  return dz;
}

// ---- the stem --------------------------------------------------------------------------------------------------------

// The stem's pool reads pixels, and vectors as they are.
NormPool pool_of(const Tensor& x) {
  NormPool p{.n = x.size(0), .h = x.size(2), .w = x.size(3), .c = x.size(1)};
  p.oh = (p.h - 1) / 2 + 1, p.ow = (p.w - 1) / 2 + 1;
  p.x = x.const_data_ptr();
  return p;
}

Tensor pooled(const NormPool& p, ScalarType dtype) {
  return kept({p.n, p.c, p.oh, p.ow}, {p.c * p.oh * p.ow, 1, p.ow * p.c, p.c}, dtype);
}

std::tuple<Tensor, Tensor> bn_act_max_pool(const Tensor& x, const Tensor& scale, const Tensor& shift) {
  const char* const op = "bn_act_max_pool";
  const Activation a(op, x);
  NormPool p = pool_of(x);
  p.scale = vector_of(op, "scale", scale, a.channels), p.shift = vector_of(op, "shift", shift, a.channels);
  const Tensor y = pooled(p, x.scalar_type()), index = pooled(p, ScalarType::Byte);
  p.y = y.mutable_data_ptr(), p.winners = data<uint8_t>(index);
  torch::stable::parallel_for(0, p.n * p.oh, 1, [&](int64_t begin, int64_t end) { kernels().pool(p, a.bytes, begin, end); });
  return {y, index};
}

NormPool pool_backward_of(const char* op, const Activation& a, const Tensor& dy, const Tensor& index, const Tensor& x,
                          const Tensor& scale, const Tensor& shift, const Tensor& mean) {
  NormPool p = pool_of(x);
  for (const auto& [name, t, dtype] : {std::tuple{"dy", &dy, x.scalar_type()}, {"index", &index, ScalarType::Byte}}) {
    const bool fits = t->dim() == 4 && t->size(0) == p.n && t->size(1) == p.c && t->size(2) == p.oh &&
                      t->size(3) == p.ow && t->scalar_type() == dtype && is_nhwc(*t);
    STD_TORCH_CHECK(fits, op, ": ", name, " must be of the pooled ", text(x), " in NHWC order, got ", text(*t));
  }
  p.dy = dy.const_data_ptr(), p.index = static_cast<const uint8_t*>(index.const_data_ptr());
  p.scale = vector_of(op, "scale", scale, a.channels), p.shift = vector_of(op, "shift", shift, a.channels);
  p.mean = vector_of(op, "mean", mean, a.channels);
  return p;
}

std::tuple<Tensor, Tensor> bn_act_max_pool_backward_reduce(const Tensor& dy, const Tensor& index, const Tensor& x,
                                                           const Tensor& scale, const Tensor& shift, const Tensor& mean,
                                                           const Tensor& invstd, int64_t rows) {
  const char* const op = "bn_act_max_pool_backward_reduce";
  const Activation a(op, x);
  STD_TORCH_CHECK(rows >= 1, op, ": a reduction needs at least one row, got rows=", rows);
  const NormPool p = pool_backward_of(op, a, dy, index, x, scale, shift, mean);
  const int64_t step = std::max<int64_t>(kSummed / std::max<int64_t>(p.w * p.c, 1), 1);
  return summed(op, a, invstd, a.channels, p.n * p.h, step,
                [&](int64_t begin, int64_t end, float* sums, float* products) {
                  kernels().pool_backward_sums(p, a.bytes, begin, end, sums, products);
                });
}

Tensor bn_act_max_pool_backward_apply(const Tensor& dy, const Tensor& index, const Tensor& x, const Tensor& scale,
                                      const Tensor& shift, const Tensor& mean, const Tensor& invstd,
                                      const OptionalTensor& sum_dy, const OptionalTensor& sum_dy_xhat, double count) {
  const char* const op = "bn_act_max_pool_backward_apply";
  const Activation a(op, x);
  NormPool p = pool_backward_of(op, a, dy, index, x, scale, shift, mean);
  Vectors v(op, a, scale, shift, mean);
  v.close(op, a, invstd, sum_dy, sum_dy_xhat, count);
  p.slope = v.or_null(v.slope), p.offset = v.or_null(v.offset);
  const Tensor dx = kept_like(x);
  p.dx = dx.mutable_data_ptr();
  torch::stable::parallel_for(0, p.n * p.h, 1, [&](int64_t begin, int64_t end) {
    kernels().pool_backward_apply(p, a.bytes, begin, end);
  });
  return dx;
}

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(resnet_fused_cpu, m) {
  m.def("bn_stats(Tensor x, SymInt rows) -> (Tensor mean, Tensor m2, Tensor count)");
  m.def(
      "bn_finalize(Tensor mean, Tensor m2, Tensor count, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, float momentum, float eps) "
      "-> (Tensor scale, Tensor shift, Tensor save_mean, Tensor save_invstd)");
  m.def(
      "bn_apply(Tensor x, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale, Tensor? "
      "residual_shift, bool relu, bool with_mask) -> (Tensor y, Tensor mask)");
  m.def(
      "bn_backward_reduce(Tensor dy, Tensor x, Tensor? mask, Tensor scale, Tensor shift, Tensor mean, Tensor invstd, "
      "bool relu, SymInt rows) -> (Tensor sum_dy, Tensor sum_dy_xhat)");
  m.def(
      "bn_backward_apply(Tensor dy, Tensor x, Tensor? mask, Tensor scale, Tensor shift, Tensor mean, Tensor invstd, "
      "Tensor? sum_dy, Tensor? sum_dy_xhat, float count, bool relu, bool with_dresidual) "
      "-> (Tensor dx, Tensor dresidual)");
  m.def("add_act(Tensor x, Tensor other, bool relu) -> Tensor");
  m.def("add_act_backward(Tensor dy, Tensor y) -> Tensor");
  m.def("bn_act_max_pool(Tensor x, Tensor scale, Tensor shift) -> (Tensor y, Tensor index)");
  m.def(
      "bn_act_max_pool_backward_reduce(Tensor dy, Tensor index, Tensor x, Tensor scale, Tensor shift, Tensor mean, "
      "Tensor invstd, SymInt rows) -> (Tensor sum_dy, Tensor sum_dy_xhat)");
  m.def(
      "bn_act_max_pool_backward_apply(Tensor dy, Tensor index, Tensor x, Tensor scale, Tensor shift, Tensor mean, "
      "Tensor invstd, Tensor? sum_dy, Tensor? sum_dy_xhat, float count) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("bn_stats", TORCH_BOX(&resnet_fused::cpu::bn_stats));
  m.impl("bn_finalize", TORCH_BOX(&resnet_fused::cpu::bn_finalize));
  m.impl("bn_apply", TORCH_BOX(&resnet_fused::cpu::bn_apply));
  m.impl("bn_backward_reduce", TORCH_BOX(&resnet_fused::cpu::bn_backward_reduce));
  m.impl("bn_backward_apply", TORCH_BOX(&resnet_fused::cpu::bn_backward_apply));
  m.impl("add_act", TORCH_BOX(&resnet_fused::cpu::add_act));
  m.impl("add_act_backward", TORCH_BOX(&resnet_fused::cpu::add_act_backward));
  m.impl("bn_act_max_pool", TORCH_BOX(&resnet_fused::cpu::bn_act_max_pool));
  m.impl("bn_act_max_pool_backward_reduce", TORCH_BOX(&resnet_fused::cpu::bn_act_max_pool_backward_reduce));
  m.impl("bn_act_max_pool_backward_apply", TORCH_BOX(&resnet_fused::cpu::bn_act_max_pool_backward_apply));
}
