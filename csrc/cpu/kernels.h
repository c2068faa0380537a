// All kernels for this file's vectors.
#pragma once

#include "groups.h"
#include "max_pool.h"
#include "norm_kernels.h"
#include "quantise.h"
#include "vectors.h"
#include "winograd.h"

namespace resnet_fused::cpu::RESNET_FUSED_LANES {

template <template <class Product, class Out> class Micro>
constexpr Algorithm by_panels{
    .float32 = kernel_of<Panels<Micro<Float32, float>>>,
    .bfloat16 = kernel_of<Panels<Micro<Bfloat16, BFloat16>>>,
#ifdef __AVX512F__
    .int8 = kernel_of<Panels<Micro<Int8, uint8_t>>>,
    .int8_to_float32 = kernel_of<Panels<Micro<Int8, float>>>,
#endif
};

template <class T>
constexpr Kernel winograd = kernel_of<Winograd<Vectors<Float32, float>, T, T>>;

constexpr Kernels all_kernels{
    .columns = kColumns,
    .direct = by_panels<Vectors>,
    .grouped = by_panels<Groups>,
#ifdef __AVX512F__
    .winograd = {.float32 = winograd<float>},
#else
    .widens = true,
    .winograd = {.float32 = winograd<float>, .bfloat16 = winograd<BFloat16>},
#endif
    .max_pool = max_pool,
    .quantise = quantise,
    .mean = mean,
    .norm = norm_kernels,
};

}  // namespace resnet_fused::cpu::RESNET_FUSED_LANES
