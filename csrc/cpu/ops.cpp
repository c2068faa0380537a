// The operators of frozen networks: what they take, and the kernel for it.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "conv.h"
#include "instructions.h"
#include "tensors.h"

namespace resnet_fused::cpu {
namespace {

using Sizes = std::vector<int64_t>;

// For each of float32, bfloat16 and int8 that this CPU multiplies: name/columns of a block of weights/their bytes; and
// "amx" where it is.
std::string supported() {
  std::string names;
  for (const auto& [name, x] : {std::pair{"float32", ScalarType::Float}, std::pair{"bfloat16", ScalarType::BFloat16},
                                std::pair{"int8", ScalarType::Byte}}) {
    if (const Kernels* kernels = kernels_for(x)) {
      names += std::string(name) + "/" + std::to_string(kernels->columns) + "/" +
               std::to_string(bytes_of(weight_type(x))) + " ";
    }
  }
  if (has_amx()) names += "amx";
  return names;
}

// The kernel of an algorithm for these types, or null where there is none.
const Kernel* find(const Algorithm& algorithm, ScalarType x, ScalarType y) {
  const Kernel* found = nullptr;
  if (x == ScalarType::Float && y == x) found = &algorithm.float32;
  if (x == ScalarType::BFloat16 && y == x) found = &algorithm.bfloat16;
  if (x == ScalarType::Byte && y == x) found = &algorithm.int8;
  if (x == ScalarType::Byte && y == ScalarType::Float) found = &algorithm.int8_to_float32;
  return found != nullptr && found->run != nullptr ? found : nullptr;
}

void check_image(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4 && is_nhwc(t), name, " must be 4-D and dense in NHWC order");
}

void check_channels(const char* name, const Tensor& t, int64_t channels) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) >= channels && t.scalar_type() == ScalarType::Float && t.is_contiguous(),
                  "conv: ", name, " must be a contiguous float32 vector of ", channels, " values");
}

struct Pair {
  int64_t h, w;
};

Pair pair(const Sizes& values) {
  STD_TORCH_CHECK(values.size() == 2, "conv: filter, stride and padding must have two values each");
  return {values[0], values[1]};
}

struct Arguments {
  const Tensor &x, &weight;
  const OptionalTensor& scale;
  const Tensor& bias;
  const OptionalTensor& residual;
  int64_t channels;
  Pair filter, stride, padding;
  int64_t groups;
  bool relu;
  int64_t x_zero_point;
  double residual_scale;
  int64_t residual_zero_point;
  double y_scale;
  int64_t y_zero_point;
};

// The kernel for a convolution with weights of this kind, or null where there is none.
const Kernel* find_kernel(const Arguments& a, const Conv& c, bool winograd, ScalarType y, bool amx) {
  const ScalarType x = a.x.scalar_type();
  const Kernels* kernels = kernels_for(x);
  if (kernels == nullptr) return nullptr;
  if (winograd) {
    const bool fits = c.stride_h == 1 && c.stride_w == 1 && c.c % 16 == 0 && a.groups == 1 && !a.scale;
    return fits ? find(kernels->winograd, x, y) : nullptr;
  }
  if (a.groups > 1) {
    const int64_t outputs = c.k / a.groups;
    const bool several = outputs < 16 && 16 % outputs == 0 && outputs == c.group;
    return several || outputs % 16 == 0 ? find(kernels->grouped, x, y) : nullptr;
  }
  const bool tiles = amx && has_amx() && x != ScalarType::Float && c.s * c.c * bytes_of(x) % 64 == 0;
  return find(tiles ? amx_tiles : kernels->direct, x, y);
}

// Four fifths are split evenly. A thread that is done takes of the rest: on a core that others use, too, it takes less.
void share(const Kernel& kernel, const Conv& c) {
  constexpr int64_t kParts = 4;
  const int64_t units = kernel.units(c), even = std::max<int64_t>(units * 4 / 5, 1);
  const int64_t part = std::max<int64_t>((units - even) / kParts, 1);
  std::atomic<int64_t> next = even;
  torch::stable::parallel_for(0, even, 1, [&](int64_t begin, int64_t end) {
    if (begin == 0 && end == even) return kernel.run(c, 0, units);  // by one thread
    kernel.run(c, begin, end);
    for (int64_t i; (i = next.fetch_add(part)) < units;) kernel.run(c, i, std::min(i + part, units));
  });
}

// `y` is what is overwritten, or null for a new tensor.
Tensor run(const Arguments& a, ScalarType y_dtype, bool amx, const Tensor* y) {
  check_image("x", a.x);
  Conv c{.n = a.x.size(0), .h = a.x.size(2), .w = a.x.size(3), .c = a.x.size(1), .k = a.channels};
  c.r = a.filter.h, c.s = a.filter.w;
  c.stride_h = a.stride.h, c.stride_w = a.stride.w, c.pad_h = a.padding.h, c.pad_w = a.padding.w;
  STD_TORCH_CHECK(c.r > 0 && c.s > 0 && c.stride_h > 0 && c.stride_w > 0 && c.pad_h >= 0 && c.pad_w >= 0 && c.k > 0 &&
                      c.h + 2 * c.pad_h >= c.r && c.w + 2 * c.pad_w >= c.s && c.c > 0,
                  "conv: the filter must fit into the padded image");
  c.oh = (c.h + 2 * c.pad_h - c.r) / c.stride_h + 1;
  c.ow = (c.w + 2 * c.pad_w - c.s) / c.stride_w + 1;

  STD_TORCH_CHECK(a.groups > 0 && c.c % a.groups == 0 && c.k % a.groups == 0,
                  "conv: the channels of x and of the result must be divisible into groups");
  c.group = c.c / a.groups;
  const ScalarType x_dtype = a.x.scalar_type();
  const Tensor& w = a.weight;
  const bool winograd = c.r == 3 && c.s == 3 && w.dim() == 5 && w.size(1) == 16;
  const int64_t rows = winograd ? 16 : c.r, columns = winograd ? 1 : c.s;
  const Kernel* kernel = find_kernel(a, c, winograd, y_dtype, amx);
  STD_TORCH_CHECK(kernel != nullptr, "conv: no kernel on this CPU takes ", torch::headeronly::toString(x_dtype), " to ",
                  torch::headeronly::toString(y_dtype), " by this weight, stride and number of groups");
  const int64_t block = kernels_for(x_dtype)->columns, blocks = (c.k + block - 1) / block;
  const int64_t values = kWord / bytes_of(weight_type(x_dtype));
  const int64_t words = (columns * c.group + values - 1) / values;  // read together, of each row of the filter
  const bool inside = c.group % values == 0 || (a.groups == 1 && c.pad_w > 0);
  STD_TORCH_CHECK(inside, "conv: the channels of a pixel must fill words of 4 bytes where nothing is padded or grouped");
  STD_TORCH_CHECK(w.dim() == 5 && w.is_contiguous() && w.size(0) == blocks && w.size(1) == rows &&
                      w.size(2) == words && w.size(3) == block && w.size(4) == values &&
                      w.scalar_type() == weight_type(x_dtype),
                  "conv: weight is not packed for this CPU, x and filter");
  check_channels("bias", a.bias, blocks * block);
  if (a.scale) check_channels("scale", *a.scale, blocks * block);

  const Sizes sizes = {c.n, c.k, c.oh, c.ow};
  const Tensor result = y ? *y : empty_nhwc(sizes, y_dtype);
  for (const Tensor* t : {y, a.residual ? &*a.residual : nullptr}) {
    if (t == nullptr) continue;
    check_image("residual", *t);
    STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), t->sizes().begin()) && t->scalar_type() == y_dtype,
                    "conv: residual must have the shape and the dtype of the result");
  }
  c.x = a.x.const_data_ptr();
  c.weight = w.const_data_ptr();
  c.scale = a.scale ? static_cast<const float*>(a.scale->const_data_ptr()) : nullptr;
  c.bias = static_cast<const float*>(a.bias.const_data_ptr());
  c.y = result.mutable_data_ptr();
  c.residual = y ? c.y : a.residual ? a.residual->const_data_ptr() : nullptr;
  c.relu = a.relu;
  c.x_grid = {1, static_cast<int32_t>(a.x_zero_point)};
  c.residual_grid = {static_cast<float>(a.residual_scale), static_cast<int32_t>(a.residual_zero_point)};
  c.y_grid = {static_cast<float>(a.y_scale), static_cast<int32_t>(a.y_zero_point)};
  if (c.n > 0) share(*kernel, c);
  return result;
}

Tensor conv(const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const Tensor& bias,
            const OptionalTensor& residual, int64_t channels, const Sizes& filter, const Sizes& stride,
            const Sizes& padding, int64_t groups, bool relu, int64_t x_zero_point, double residual_scale,
            int64_t residual_zero_point, double y_scale, int64_t y_zero_point, bool to_float32, bool amx) {
  const Arguments a{x, weight, scale, bias, residual, channels, pair(filter), pair(stride), pair(padding), groups, relu,
                    x_zero_point, residual_scale, residual_zero_point, y_scale, y_zero_point};
  return run(a, to_float32 ? ScalarType::Float : x.scalar_type(), amx, nullptr);
}

void conv_add_(Tensor residual, const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const Tensor& bias,
               int64_t channels, const Sizes& filter, const Sizes& stride, const Sizes& padding, int64_t groups, bool relu,
               int64_t x_zero_point, double residual_scale, int64_t residual_zero_point, double y_scale,
               int64_t y_zero_point, bool amx) {
  const Arguments a{x, weight, scale, bias, std::nullopt, channels, pair(filter), pair(stride), pair(padding), groups,
                    relu, x_zero_point, residual_scale, residual_zero_point, y_scale, y_zero_point};
  run(a, residual.scalar_type(), amx, &residual);
}

Tensor max_pool_of(const Tensor& x, Pair filter, Pair stride, Pair padding) {
  check_image("x", x);
  const ScalarType dtype = x.scalar_type();
  MaxPool p{.n = x.size(0), .h = x.size(2), .w = x.size(3), .c = x.size(1), .r = filter.h, .s = filter.w};
  p.stride_h = stride.h, p.stride_w = stride.w, p.pad_h = padding.h, p.pad_w = padding.w;
  STD_TORCH_CHECK(p.r > 0 && p.s > 0 && p.stride_h > 0 && p.stride_w > 0 && p.pad_h >= 0 && p.pad_w >= 0 &&
                      2 * p.pad_h <= p.r && 2 * p.pad_w <= p.s && p.h + 2 * p.pad_h >= p.r &&
                      p.w + 2 * p.pad_w >= p.s && p.c > 0 && p.c % 16 == 0,
                  "max_pool: the filter must fit into the padded image, padding be at most half of it, and the "
                  "channels be a multiple of 16");
  STD_TORCH_CHECK(other_kernels() != nullptr && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                                              dtype == ScalarType::Byte),
                  "max_pool: no kernel on this CPU takes ", torch::headeronly::toString(dtype));
  p.oh = (p.h + 2 * p.pad_h - p.r) / p.stride_h + 1;
  p.ow = (p.w + 2 * p.pad_w - p.s) / p.stride_w + 1;
  const Tensor y = empty_nhwc({p.n, p.c, p.oh, p.ow}, dtype);
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  torch::stable::parallel_for(0, p.n * p.oh, 1, [&](int64_t begin, int64_t end) {
    other_kernels()->max_pool(p, bytes_of(dtype), begin, end);
  });
  return y;
}

Tensor max_pool(const Tensor& x, const Sizes& filter, const Sizes& stride, const Sizes& padding) {
  return max_pool_of(x, pair(filter), pair(stride), pair(padding));
}

// And whether all of x is finite, which 8 bits cannot say.
std::pair<Tensor, bool> quantise_of(const Tensor& x, Grid grid) {
  check_image("x", x);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(other_kernels() != nullptr && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16),
                  "quantise: no kernel on this CPU takes ", torch::headeronly::toString(dtype));
  const Tensor q = empty_nhwc({x.size(0), x.size(1), x.size(2), x.size(3)}, ScalarType::Byte);
  const void* const from = x.const_data_ptr();
  auto* const to = static_cast<uint8_t*>(q.mutable_data_ptr());
  std::atomic<bool> finite = true;
  constexpr int64_t kGrain = 16384;
  torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    if (!other_kernels()->quantise(from, bytes_of(dtype), grid, to, begin, end)) finite = false;
  });
  return {q, finite};
}

Tensor quantise(const Tensor& x, double scale, int64_t zero_point) {
  return quantise_of(x, {static_cast<float>(scale), static_cast<int32_t>(zero_point)}).first;
}

Tensor mean_of(const Tensor& x, Grid x_grid, ScalarType y_dtype) {
  check_image("x", x);
  const ScalarType dtype = x.scalar_type();
  Mean mean{.pixels = x.size(2) * x.size(3), .channels = x.size(1), .x = x.const_data_ptr(), .x_grid = x_grid};
  constexpr int64_t kMost = int64_t{1} << 23;  // of 8 bits, that a sum of 32 holds
  const bool floats = y_dtype == ScalarType::Float || y_dtype == ScalarType::BFloat16;
  const bool known = floats && (dtype == y_dtype || (dtype == ScalarType::Byte && mean.pixels <= kMost));
  STD_TORCH_CHECK(other_kernels() != nullptr && known && mean.pixels > 0, "mean: no kernel on this CPU takes ",
                  mean.pixels, " pixels of ", torch::headeronly::toString(dtype), " to ",
                  torch::headeronly::toString(y_dtype));
  const Tensor y = empty_nhwc({x.size(0), x.size(1), 1, 1}, y_dtype);
  mean.y = y.mutable_data_ptr();
  const int64_t lanes = other_kernels()->columns / 2, grain = std::max<int64_t>(4096 / mean.pixels, 1);
  const int64_t units = x.size(0) * ((x.size(1) + lanes - 1) / lanes);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    other_kernels()->mean(mean, bytes_of(dtype), bytes_of(y_dtype), begin, end);
  });
  return y;
}

Tensor mean(const Tensor& x, double scale, int64_t zero_point, bool to_bfloat16) {
  const Grid grid{static_cast<float>(scale), static_cast<int32_t>(zero_point)};
  return mean_of(x, grid, to_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
}

// One op of `steps`: its numbers in their order. Value 0 is the input of the whole, value i the result of step i - 1.
struct Step {
  int64_t op, dtype;    // the result's, of kOps and kDtypes
  int64_t x, residual;  // values; residual is -1 for none
  int64_t channels;
  Pair filter, stride, padding;
  int64_t groups, relu, x_zero_point, residual_zero_point, y_zero_point;
};
constexpr size_t kNumbers = sizeof(Step) / sizeof(int64_t), kTensors = 3, kScales = 3;
enum Op : int64_t { kConv, kMaxPool, kMean, kQuantise, kOps };
constexpr ScalarType kDtypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Byte};

std::vector<Step> steps_of(const Sizes& numbers) {
  STD_TORCH_CHECK(!numbers.empty() && numbers.size() % kNumbers == 0, "steps: ", kNumbers, " numbers each, got ",
                  numbers.size());
  std::vector<Step> steps(numbers.size() / kNumbers);
  std::memcpy(steps.data(), numbers.data(), numbers.size() * sizeof(int64_t));
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& s = steps[i];
    const auto known = static_cast<int64_t>(i);
    STD_TORCH_CHECK(s.op >= 0 && s.op < kOps && s.dtype >= 0 && s.dtype < std::ssize(kDtypes), "steps: step ", i,
                    " is of no known op or dtype");
    STD_TORCH_CHECK(s.x >= 0 && s.x <= known && s.residual >= -1 && s.residual <= known, "steps: step ", i,
                    " reads a value that no step before it made");
  }
  return steps;
}

// A step that is no convolution; `scale` of x and, behind the residual's, of the result.
Tensor run_other(const Step& s, const Tensor& x, const double* scale) {
  if (s.op == kMaxPool) return max_pool_of(x, s.filter, s.stride, s.padding);
  const Grid x_grid{static_cast<float>(scale[0]), static_cast<int32_t>(s.x_zero_point)};
  if (s.op == kMean) return mean_of(x, x_grid, kDtypes[s.dtype]);
  const auto [q, finite] = quantise_of(x, {static_cast<float>(scale[2]), static_cast<int32_t>(s.y_zero_point)});
  STD_TORCH_CHECK(finite, "quantise: 8 bits have no value for a NaN or an infinity");
  return q;
}

Tensor steps(const Tensor& x, const std::vector<OptionalTensor>& tensors, const Sizes& numbers,
             const std::vector<double>& scales, bool amx) {
  const std::vector<Step> steps = steps_of(numbers);
  STD_TORCH_CHECK(tensors.size() == kTensors * steps.size() && scales.size() == kScales * steps.size(),
                  "steps: a weight, a scale and a bias, and the scales of x, residual and result for each step");
  std::vector<OptionalTensor> values(steps.size() + 1);
  std::vector<size_t> last_reader(values.size(), steps.size());
  values[0] = x;
  for (size_t i = 0; i < steps.size(); ++i) {
    last_reader[steps[i].x] = i;
    if (steps[i].residual >= 0) last_reader[steps[i].residual] = i;
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& s = steps[i];
    const Tensor& from = *values[s.x];
    const double* const scale = &scales[kScales * i];
    if (s.op == kConv) {
      const OptionalTensor *const tensor = &tensors[kTensors * i], none;
      STD_TORCH_CHECK(tensor[0] && tensor[2], "steps: step ", i, " has no weight or no bias");
      const bool overwrites = s.residual > 0 && s.residual != s.x && last_reader[s.residual] == i;
      const OptionalTensor& added = overwrites || s.residual < 0 ? none : std::as_const(values[s.residual]);
      const Arguments a{from, *tensor[0], tensor[1], *tensor[2], added, s.channels, s.filter, s.stride, s.padding,
                        s.groups, s.relu != 0, s.x_zero_point, scale[1], s.residual_zero_point, scale[2],
                        s.y_zero_point};
      values[i + 1] = run(a, kDtypes[s.dtype], amx, overwrites ? &*values[s.residual] : nullptr);
    } else {
      values[i + 1] = run_other(s, from, scale);
    }
    for (const int64_t value : {s.x, s.residual}) {
      if (value >= 0 && last_reader[value] == i) values[value].reset();
    }
  }
  return *values.back();
}

}  // namespace
}  // namespace resnet_fused::cpu

STABLE_TORCH_LIBRARY(resnet_fused_cpu, m) {
  m.def("supported() -> str");
  m.def(
      "conv(Tensor x, Tensor weight, Tensor? scale, Tensor bias, Tensor? residual, int channels, int[] filter, "
      "int[] stride, int[] padding, int groups, bool relu, int x_zero_point=0, float residual_scale=1.0, "
      "int residual_zero_point=0, float y_scale=1.0, int y_zero_point=0, bool to_float32=False, bool amx=True) "
      "-> Tensor");
  m.def(
      "conv_add_(Tensor(a!) residual, Tensor x, Tensor weight, Tensor? scale, Tensor bias, int channels, int[] filter, "
      "int[] stride, int[] padding, int groups, bool relu, int x_zero_point=0, float residual_scale=1.0, "
      "int residual_zero_point=0, float y_scale=1.0, int y_zero_point=0, bool amx=True) -> ()");
  m.def("steps(Tensor x, Tensor?[] tensors, int[] numbers, float[] scales, bool amx=True) -> Tensor");
  m.def("quantise(Tensor x, float scale, int zero_point) -> Tensor");
  m.def("mean(Tensor x, float scale=1.0, int zero_point=0, bool to_bfloat16=False) -> Tensor");
  m.def("max_pool(Tensor x, int[] filter, int[] stride, int[] padding) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("conv", TORCH_BOX(&resnet_fused::cpu::conv));
  m.impl("conv_add_", TORCH_BOX(&resnet_fused::cpu::conv_add_));
  m.impl("steps", TORCH_BOX(&resnet_fused::cpu::steps));
  m.impl("quantise", TORCH_BOX(&resnet_fused::cpu::quantise));
  m.impl("mean", TORCH_BOX(&resnet_fused::cpu::mean));
  m.impl("max_pool", TORCH_BOX(&resnet_fused::cpu::max_pool));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  m.impl("supported", TORCH_BOX(&resnet_fused::cpu::supported));
}
