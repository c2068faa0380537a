#include "kernels.h"

namespace resnet_fused::cpu {
const Kernels avx2_kernels = avx2::all_kernels;
}
