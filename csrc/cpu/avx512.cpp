#include "kernels.h"

namespace resnet_fused::cpu {
const Kernels avx512_kernels = avx512::all_kernels;
}
