// Batch norm in training as operators, with the schemas of the CUDA ones.
#include <bit>
#include <cmath>

#include <torch/csrc/stable/library.h>

#include "norm_tensors.h"

namespace resnet_fused::cpu {
namespace {

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
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("bn_stats", TORCH_BOX(&resnet_fused::cpu::bn_stats));
  m.impl("bn_finalize", TORCH_BOX(&resnet_fused::cpu::bn_finalize));
  m.impl("bn_apply", TORCH_BOX(&resnet_fused::cpu::bn_apply));
  m.impl("bn_backward_reduce", TORCH_BOX(&resnet_fused::cpu::bn_backward_reduce));
  m.impl("bn_backward_apply", TORCH_BOX(&resnet_fused::cpu::bn_backward_apply));
  m.impl("add_act", TORCH_BOX(&resnet_fused::cpu::add_act));
  m.impl("add_act_backward", TORCH_BOX(&resnet_fused::cpu::add_act_backward));
}
