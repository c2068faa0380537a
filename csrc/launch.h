// What the launchers share: checks of the arguments, the device and its stream, grids.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "device.cuh"

#ifndef RESNET_FUSED_HOST
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

namespace resnet_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string text(const torch::headeronly::IntHeaderOnlyArrayRef& values) {
  std::string out = "[";
  for (size_t i = 0; i < values.size(); ++i) out += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  return out + "]";
}

inline std::string text(const Tensor& t) {
  return std::string(torch::headeronly::toString(t.scalar_type())) + " " + text(t.sizes()) + " with strides " +
         text(t.strides());
}

inline bool same(const torch::headeronly::IntHeaderOnlyArrayRef& a, const torch::headeronly::IntHeaderOnlyArrayRef& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

// Whether the tensor fills its memory in the order (n, h, w, c) or (n, c, h, w); strides of dimensions of size 1 do not
// matter.
inline bool is_dense(const Tensor& t, bool nhwc) {
  constexpr int kOrder[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  int64_t expected = 1;
  for (const int d : kOrder[nhwc]) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// A named activation of an op: the first decides shape, type and layout, the others must agree.
struct Named {
  const char* name;
  const Tensor* tensor;
};

struct Activation {
  int64_t N, C, H, W;
  ScalarType dtype;
  bool nhwc;

  int64_t pixels() const { return N * H * W; }
  int64_t count() const { return pixels() * C; }
};

inline Activation check_activations(const char* op, std::initializer_list<Named> all) {
  const auto& [first_name, first] = *all.begin();
  STD_TORCH_CHECK(first->dim() == 4, op, ": ", first_name, " must be 4-D [N, C, H, W], got ", text(*first));
  const ScalarType dtype = first->scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op, ": ",
                  first_name, " must be Float, Half or BFloat16, got ", text(*first));
  bool layout[2] = {true, true};
  for (const auto& [name, t] : all) {
    STD_TORCH_CHECK(t->dim() == 4 && same(t->sizes(), first->sizes()) && t->scalar_type() == dtype, op, ": ", name,
                    " must have the shape and dtype of ", first_name, ", ", text(*first), "; got ", text(*t));
    STD_TORCH_CHECK(t->get_device_index() == first->get_device_index() && t->is_cuda() == first->is_cuda(), op, ": ",
                    name, " must be on the device of ", first_name);
    for (const bool nhwc : {false, true}) layout[nhwc] = layout[nhwc] && (t->numel() == 0 || is_dense(*t, nhwc));
    STD_TORCH_CHECK(layout[0] || layout[1], op, ": ", name,
                    " must be dense in NCHW or NHWC order, and alike in all activations; ", first_name, " is ",
                    text(*first), ", ", name, " is ", text(*t));
  }
  return {first->size(0), first->size(1), first->size(2), first->size(3), dtype, !layout[0]};
}

inline void check_vector(const char* op, const char* name, const Tensor& v, int64_t C, const Tensor& x) {
  STD_TORCH_CHECK(v.dim() == 1 && v.size(0) == C && v.scalar_type() == ScalarType::Float && v.is_contiguous(), op, ": ",
                  name, " must be a contiguous Float vector with one value for each of the ", C, " channels, got ",
                  text(v));
  STD_TORCH_CHECK(v.get_device_index() == x.get_device_index() && v.is_cuda() == x.is_cuda(), op, ": ", name,
                  " must be on the device of x");
}

inline void check_rows(const char* op, int64_t rows) {
  STD_TORCH_CHECK(rows >= 1 && rows < int64_t(1) << 24, op, ": rows must be from 1 to 16777215, got ", rows);
}

template <class T = float>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T = float>
const T* data(const OptionalTensor& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}
template <class T = float>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline bool aligned(std::initializer_list<const void*> pointers, uintptr_t bytes = 16) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [bytes](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; });
}

// Calls f with a value of the C++ type.
template <class F>
void dispatch(ScalarType dtype, F f) {
  if (dtype == ScalarType::Float) {
    f(float());
  } else if (dtype == ScalarType::Half) {
    f(half());
  } else {
    f(bfloat16());
  }
}

inline Tensor float_like(const Tensor& x, std::initializer_list<int64_t> size) {
  return torch::stable::new_empty(x, size, ScalarType::Float);
}

// The device of a tensor, made current, and its stream.
class Device {
 public:
#ifdef RESNET_FUSED_HOST
  explicit Device(const Tensor&) {}
  // Few, so that persistent loops go round in small tests.
  template <class... P>
  int64_t resident_blocks(void (*)(P...)) const {
    return 3;
  }
  template <class... P, class... A>
  void launch(void (*kernel)(P...), dim3 grid, A... arguments) const {
    host::launch(grid, dim3(kThreads), 0, [&] { kernel(arguments...); });
  }
#else
  explicit Device(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, t.get_device_index()));
  }
  // How many blocks of the kernel the device holds at once: the grid of a persistent kernel.
  template <class... P>
  int64_t resident_blocks(void (*kernel)(P...)) const {
    thread_local std::unordered_map<const void*, int> known;
    int& per_multiprocessor = known[reinterpret_cast<const void*>(kernel)];
    if (per_multiprocessor == 0)
      STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, 0));
    return int64_t(std::max(per_multiprocessor, 1)) * multiprocessors_;
  }
  template <class... P, class... A>
  void launch(void (*kernel)(P...), dim3 grid, A... arguments) const {
    cudaLaunchConfig_t configuration{};
    configuration.gridDim = grid;
    configuration.blockDim = dim3(kThreads);
    configuration.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&configuration, kernel, static_cast<P>(arguments)...));
  }
#endif

 private:
#ifndef RESNET_FUSED_HOST
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  int multiprocessors_ = 0;
#endif
};

// The x dimension of a grid; the others would end at 65,535.
inline unsigned grid_x(const char* op, int64_t blocks) {
  STD_TORCH_CHECK(blocks < int64_t(1) << 31, op, ": ", blocks, " blocks do not fit a grid; choose fewer rows");
  return static_cast<unsigned>(blocks);
}

// Threads enough for `items`, at most what is resident, but always a multiple of `period` of them.
template <class Kernel>
unsigned persistent_grid(const Device& device, Kernel kernel, int64_t items, int64_t period, int64_t& step) {
  const auto blocks_for = [](int64_t threads) { return (threads + kThreads - 1) / kThreads; };
  const int64_t blocks =
      std::max({std::min(blocks_for(items), device.resident_blocks(kernel)), blocks_for(period), int64_t(1)});
  step = blocks * kThreads / period * period;
  return static_cast<unsigned>(blocks);
}

constexpr int kWarpsPerBlock = kThreads / kWarp;

}  // namespace resnet_fused
