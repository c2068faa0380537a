// The operators: what they take, and the choice of a kernel by element type and instruction set.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "conv.h"
#include "max_pool.h"
#include "memory.h"
#include "quantise.h"

namespace resnet_fused::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

// Linux gives a process AMX's registers when it asks.
bool asks_for_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25, kAll = kBfloat16 | kTiles | kInt8;
  return (edx & kAll) == kAll && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct Instructions {
  bool float32 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  bool bfloat16 = float32 && __builtin_cpu_supports("avx512bf16");
  bool int8 = float32 && __builtin_cpu_supports("avx512vnni");
  bool amx = bfloat16 && int8 && asks_for_tiles();
};

const Instructions& instructions() {
  static const Instructions found;
  return found;
}

// Which of float32, bfloat16, int8 and amx this CPU has the instructions for.
std::string supported() {
  const Instructions& found = instructions();
  std::string names;
  if (found.float32) names += "float32 ";
  if (found.bfloat16) names += "bfloat16 ";
  if (found.int8) names += "int8 ";
  if (found.amx) names += "amx ";
  return names;
}

// Of one algorithm, by (type of x, type of y).
struct Kernels {
  const Kernel &float32, &bfloat16, &int8, &int8_to_float32;

  // The one for these types, or null where this CPU has not the instructions.
  const Kernel* find(ScalarType x, ScalarType y) const {
    const Instructions& found = instructions();
    if (x == ScalarType::Float && y == x && found.float32) return &float32;
    if (x == ScalarType::BFloat16 && y == x && found.bfloat16) return &bfloat16;
    if (x == ScalarType::Byte && y == x && found.int8) return &int8;
    if (x == ScalarType::Byte && y == ScalarType::Float && found.int8) return &int8_to_float32;
    return nullptr;
  }
};

const Kernel* find_direct(ScalarType x, ScalarType y, int64_t row_bytes, bool amx) {
  const Kernels vectors{avx512::float32, avx512::bfloat16, avx512::int8, avx512::int8_to_float32};
  const Kernels tiles{avx512::float32, amx::bfloat16, amx::int8, amx::int8_to_float32};
  return (amx && instructions().amx && row_bytes % 64 == 0 ? tiles : vectors).find(x, y);
}

bool is_nhwc(const Tensor& t) {
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

int bytes_of(ScalarType t) { return t == ScalarType::Byte ? 1 : t == ScalarType::BFloat16 ? 2 : 4; }

void check_image(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4 && is_nhwc(t), name, " must be 4-D and dense in NHWC order");
}

void check_channels(const char* name, const Tensor& t, int64_t blocks) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == blocks * kColumns && t.scalar_type() == ScalarType::Float &&
                      t.is_contiguous(),
                  "conv: ", name, " must be a contiguous float32 vector of ", blocks * kColumns, " values");
}

Tensor empty_nhwc(const Sizes& sizes, ScalarType dtype) {
  const int64_t bytes = sizes[0] * sizes[1] * sizes[2] * sizes[3] * bytes_of(dtype);
  const Sizes strides = {sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]};
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(take(std::max<int64_t>(bytes, 1)), sizes, strides, cpu, dtype, give_back);
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

const Kernel* find_grouped(const Conv& c, ScalarType x, ScalarType y) {
  const int64_t outputs = c.k / (c.c / c.group);
  const bool several = outputs < 16 && 16 % outputs == 0 && outputs == c.group;
  if (!several && outputs % 16 != 0) return nullptr;
  const Kernels grouped{avx512::grouped_float32, avx512::grouped_bfloat16, avx512::grouped_int8,
                        avx512::grouped_int8_to_float32};
  return grouped.find(x, y);
}

const Kernel* find_winograd(const Arguments& a, ScalarType y) {
  const bool fits = a.stride.h == 1 && a.stride.w == 1 && a.x.size(1) % 16 == 0 && a.groups == 1;
  const bool floats = a.x.scalar_type() == ScalarType::Float && y == ScalarType::Float && !a.scale;
  return fits && floats && instructions().float32 ? &avx512::winograd : nullptr;
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
  const int64_t blocks = (c.k + kColumns - 1) / kColumns, values = kWord / bytes_of(x_dtype);
  const bool winograd = c.r == 3 && c.s == 3 && w.dim() == 5 && w.size(1) == 16;
  const int64_t rows = winograd ? 16 : c.r, columns = winograd ? 1 : c.s;
  const Kernel* kernel = winograd       ? find_winograd(a, y_dtype)
                         : a.groups > 1 ? find_grouped(c, x_dtype, y_dtype)
                                        : find_direct(x_dtype, y_dtype, c.s * c.c * bytes_of(x_dtype), amx);
  STD_TORCH_CHECK(kernel != nullptr, "conv: no kernel on this CPU takes ", torch::headeronly::toString(x_dtype), " to ",
                  torch::headeronly::toString(y_dtype), " by this weight, stride and number of groups");
  const int64_t words = (columns * c.group + values - 1) / values;  // read together, of each row of the filter
  const bool inside = c.group % values == 0 || (a.groups == 1 && c.pad_w > 0);
  STD_TORCH_CHECK(inside, "conv: the channels of a pixel must fill words of 4 bytes where nothing is padded or grouped");
  STD_TORCH_CHECK(w.dim() == 5 && w.is_contiguous() && w.size(0) == blocks && w.size(1) == rows &&
                      w.size(2) == words && w.size(3) == kColumns && w.size(4) == values &&
                      w.scalar_type() == (x_dtype == ScalarType::Byte ? ScalarType::Char : x_dtype),
                  "conv: weight is not packed for this x and filter");
  check_channels("bias", a.bias, blocks);
  if (a.scale) check_channels("scale", *a.scale, blocks);

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
  if (c.n > 0) {
    torch::stable::parallel_for(0, kernel->units(c), 1,
                                [&](int64_t begin, int64_t end) { kernel->run(c, begin, end); });
  }
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

// One convolution of `convs`: its numbers in their order. Value 0 is the input of the whole, value i the result of the
// convolution i - 1.
struct Step {
  int64_t x, residual;  // values; residual is -1 for none
  int64_t channels;
  Pair filter, stride, padding;
  int64_t groups, relu, x_zero_point, residual_zero_point, y_zero_point;
};
constexpr size_t kNumbers = sizeof(Step) / sizeof(int64_t), kTensors = 3, kScales = 2;

std::vector<Step> steps_of(const Sizes& numbers) {
  STD_TORCH_CHECK(!numbers.empty() && numbers.size() % kNumbers == 0, "convs: steps of ", kNumbers, " numbers, got ",
                  numbers.size());
  std::vector<Step> steps(numbers.size() / kNumbers);
  std::memcpy(steps.data(), numbers.data(), numbers.size() * sizeof(int64_t));
  for (size_t i = 0; i < steps.size(); ++i) {
    const auto known = static_cast<int64_t>(i);
    STD_TORCH_CHECK(steps[i].x >= 0 && steps[i].x <= known && steps[i].residual >= -1 && steps[i].residual <= known,
                    "convs: step ", i, " reads a value that no step before it made");
  }
  return steps;
}

Tensor convs(const Tensor& x, const std::vector<OptionalTensor>& tensors, const Sizes& numbers,
             const std::vector<double>& scales, bool amx) {
  const std::vector<Step> steps = steps_of(numbers);
  STD_TORCH_CHECK(tensors.size() == kTensors * steps.size() && scales.size() == kScales * steps.size(),
                  "convs: a weight, a scale and a bias, and the scales of residual and result for each step");
  std::vector<OptionalTensor> values(steps.size() + 1);
  std::vector<size_t> last_reader(values.size(), steps.size());
  values[0] = x;
  for (size_t i = 0; i < steps.size(); ++i) {
    last_reader[steps[i].x] = i;
    if (steps[i].residual >= 0) last_reader[steps[i].residual] = i;
  }
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& s = steps[i];
    const OptionalTensor *const tensor = &tensors[kTensors * i], none;
    STD_TORCH_CHECK(tensor[0] && tensor[2], "convs: step ", i, " has no weight or no bias");
    const bool overwrites = s.residual > 0 && s.residual != s.x && last_reader[s.residual] == i;
    const Tensor& from = *values[s.x];
    const OptionalTensor& added = overwrites || s.residual < 0 ? none : std::as_const(values[s.residual]);
    const double* const scale = &scales[kScales * i];
    const Arguments a{from, *tensor[0], tensor[1], *tensor[2], added, s.channels, s.filter, s.stride, s.padding, s.groups,
                      s.relu != 0, s.x_zero_point, scale[0], s.residual_zero_point, scale[1], s.y_zero_point};
    values[i + 1] = run(a, from.scalar_type(), amx, overwrites ? &*values[s.residual] : nullptr);
    for (const int64_t value : {s.x, s.residual}) {
      if (value >= 0 && last_reader[value] == i) values[value].reset();
    }
  }
  return *values.back();
}

Tensor max_pool(const Tensor& x, const Sizes& filter, const Sizes& stride, const Sizes& padding) {
  check_image("x", x);
  const ScalarType dtype = x.scalar_type();
  STD_TORCH_CHECK(filter.size() == 2 && stride.size() == 2 && padding.size() == 2,
                  "max_pool: filter, stride and padding must have two values each");
  MaxPool p{.n = x.size(0), .h = x.size(2), .w = x.size(3), .c = x.size(1), .r = filter[0], .s = filter[1]};
  p.stride_h = stride[0], p.stride_w = stride[1], p.pad_h = padding[0], p.pad_w = padding[1];
  STD_TORCH_CHECK(p.r > 0 && p.s > 0 && p.stride_h > 0 && p.stride_w > 0 && p.pad_h >= 0 && p.pad_w >= 0 &&
                      2 * p.pad_h <= p.r && 2 * p.pad_w <= p.s && p.h + 2 * p.pad_h >= p.r &&
                      p.w + 2 * p.pad_w >= p.s && p.c > 0 && p.c % 16 == 0,
                  "max_pool: the filter must fit into the padded image, padding be at most half of it, and the "
                  "channels be a multiple of 16");
  STD_TORCH_CHECK(instructions().bfloat16 && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                                              dtype == ScalarType::Byte),
                  "max_pool: no kernel on this CPU takes ", torch::headeronly::toString(dtype));
  p.oh = (p.h + 2 * p.pad_h - p.r) / p.stride_h + 1;
  p.ow = (p.w + 2 * p.pad_w - p.s) / p.stride_w + 1;
  const Tensor y = empty_nhwc({p.n, p.c, p.oh, p.ow}, dtype);
  p.x = x.const_data_ptr();
  p.y = y.mutable_data_ptr();
  torch::stable::parallel_for(0, p.n * p.oh, 1, [&](int64_t begin, int64_t end) {
    avx512::max_pool(p, bytes_of(dtype), begin, end);
  });
  return y;
}

Tensor quantise(const Tensor& x, double scale, int64_t zero_point) {
  check_image("x", x);
  STD_TORCH_CHECK(instructions().int8 && instructions().bfloat16 && x.scalar_type() == ScalarType::Float,
                  "quantise: no kernel on this CPU takes ", torch::headeronly::toString(x.scalar_type()));
  const Tensor q = empty_nhwc({x.size(0), x.size(1), x.size(2), x.size(3)}, ScalarType::Byte);
  const Grid grid{static_cast<float>(scale), static_cast<int32_t>(zero_point)};
  const auto* from = static_cast<const float*>(x.const_data_ptr());
  auto* to = static_cast<uint8_t*>(q.mutable_data_ptr());
  constexpr int64_t kGrain = 16384;
  torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    avx512::quantise(from, grid, to, begin, end);
  });
  return q;
}

Tensor mean(const Tensor& x, double scale, int64_t zero_point) {
  check_image("x", x);
  const int64_t pixels = x.size(2) * x.size(3), blocks = (x.size(1) + 15) / 16;
  constexpr int64_t kMost = int64_t{1} << 23;  // of 8 bits, that a sum of 32 holds
  STD_TORCH_CHECK(instructions().int8 && x.scalar_type() == ScalarType::Byte && pixels > 0 && pixels <= kMost,
                  "mean: no kernel on this CPU takes ", pixels, " pixels of ",
                  torch::headeronly::toString(x.scalar_type()));
  const Tensor y = empty_nhwc({x.size(0), x.size(1), 1, 1}, ScalarType::Float);
  const Grid grid{static_cast<float>(scale), static_cast<int32_t>(zero_point)};
  const auto* from = static_cast<const uint8_t*>(x.const_data_ptr());
  auto* to = static_cast<float*>(y.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(4096 / pixels, 1);
  torch::stable::parallel_for(0, x.size(0) * blocks, grain, [&](int64_t begin, int64_t end) {
    avx512::mean(from, grid, pixels, x.size(1), to, begin, end);
  });
  return y;
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
  m.def("convs(Tensor x, Tensor?[] tensors, int[] numbers, float[] scales, bool amx=True) -> Tensor");
  m.def("quantise(Tensor x, float scale, int zero_point) -> Tensor");
  m.def("mean(Tensor x, float scale, int zero_point) -> Tensor");
  m.def("max_pool(Tensor x, int[] filter, int[] stride, int[] padding) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CPU, m) {
  m.impl("conv", TORCH_BOX(&resnet_fused::cpu::conv));
  m.impl("conv_add_", TORCH_BOX(&resnet_fused::cpu::conv_add_));
  m.impl("convs", TORCH_BOX(&resnet_fused::cpu::convs));
  m.impl("quantise", TORCH_BOX(&resnet_fused::cpu::quantise));
  m.impl("mean", TORCH_BOX(&resnet_fused::cpu::mean));
  m.impl("max_pool", TORCH_BOX(&resnet_fused::cpu::max_pool));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused_cpu, CompositeExplicitAutograd, m) {
  m.impl("supported", TORCH_BOX(&resnet_fused::cpu::supported));
}
