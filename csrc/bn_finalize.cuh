// bn_finalize: merges the partial statistics of all rows and folds them with the affine parameters.
//
//     mean = sum_r count_r mean_r / count        m2 = sum_r m2_r + count_r (mean_r - mean)^2        (Chan, Golub,
//     LeVeque 1979) invstd = 1 / sqrt(m2 / count + eps)        scale = weight invstd        shift = bias - mean scale
//     running = (1 - momentum) running + momentum {mean, m2 / (count - 1)}
//
// mean [rows, C], fp64; m2 [rows, C] and count [rows], fp32; the per-channel vectors are fp32, the parameters and running statistics of
// any of the three types. The arithmetic is fp64: [rows, C] is small beside the activations. Bytes: 24 per partial row
// and channel, half of them from L2.
#pragma once

#include "device.cuh"

namespace resnet_fused {

enum class DataType : int { kFloat, kHalf, kBFloat16 };

// A per-channel vector whose type is known at run time; null: absent.
struct Parameter {
  void* data;
  DataType type;

  __device__ __forceinline__ double get(int64_t c, double otherwise) const {
    if (data == nullptr) return otherwise;
    if (type == DataType::kFloat) return static_cast<const float*>(data)[c];
    if (type == DataType::kHalf) return widened(static_cast<const half*>(data)[c]);
    return widened(static_cast<const bfloat16*>(data)[c]);
  }
  __device__ __forceinline__ void set(int64_t c, double value) const {
    if (type == DataType::kFloat) {
      static_cast<float*>(data)[c] = static_cast<float>(value);
    } else if (type == DataType::kHalf) {
      static_cast<half*>(data)[c] = rounded<half>(static_cast<float>(value));
    } else {
      static_cast<bfloat16*>(data)[c] = rounded<bfloat16>(static_cast<float>(value));
    }
  }
};

struct Finalize {
  const double* mean;
  const float *m2, *count;
  Parameter weight, bias, running_mean, running_var;
  float *scale, *shift, *save_mean, *save_invstd;
  int64_t rows, C;
  double momentum, eps;
};

// The sum over the block's row lanes of one value per channel, in a fixed tree; every lane gets it.
__device__ __forceinline__ double sum_lanes(double value, double* exchange) {
  exchange[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half >= kWarp; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) exchange[threadIdx.x] += exchange[threadIdx.x + half];
    __syncthreads();
  }
  const double total = exchange[threadIdx.x % kWarp];
  __syncthreads();
  return total;
}

// A block owns 32 neighbouring channels; its eight warps take every eighth row each.
__global__ void __launch_bounds__(kThreads) bn_finalize_kernel(Finalize p) {
  SHARED_ARRAY(double, exchange, kThreads);
  constexpr int kLanes = kThreads / kWarp;
  const int64_t c = int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const bool active = c < p.C;
  const int lane = threadIdx.x / kWarp;

  double count = 0.0, sum = 0.0;
  if (active) {
#pragma unroll 4
    for (int64_t r = lane; r < p.rows; r += kLanes) {
      count += p.count[r];
      sum += static_cast<double>(p.count[r]) * p.mean[r * p.C + c];
    }
  }
  count = sum_lanes(count, exchange);
  const double mean = sum_lanes(sum, exchange) / count;
  double m2 = 0.0;
  if (active) {
#pragma unroll 4
    for (int64_t r = lane; r < p.rows; r += kLanes) {
      const double deviation = p.mean[r * p.C + c] - mean;
      m2 += p.m2[r * p.C + c] + p.count[r] * deviation * deviation;
    }
  }
  m2 = sum_lanes(m2, exchange);
  if (!active || lane != 0) return;

  const double invstd = 1.0 / sqrt(m2 / count + p.eps);
  const float scale = static_cast<float>(p.weight.get(c, 1.0) * invstd);
  p.scale[c] = scale;
  // With the rounded scale, so that its error is not multiplied by the mean.
  p.shift[c] = static_cast<float>(p.bias.get(c, 0.0) - mean * scale);
  p.save_mean[c] = static_cast<float>(mean);
  p.save_invstd[c] = static_cast<float>(invstd);
  if (p.running_mean.data != nullptr)
    p.running_mean.set(c, (1.0 - p.momentum) * p.running_mean.get(c, 0.0) + p.momentum * mean);
  if (p.running_var.data != nullptr)
    p.running_var.set(c, (1.0 - p.momentum) * p.running_var.get(c, 0.0) + p.momentum * (m2 / (count - 1.0)));
}

}  // namespace resnet_fused
