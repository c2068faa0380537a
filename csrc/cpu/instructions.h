// Which kernels the instructions of this CPU allow.
#pragma once

#include "conv.h"
#include "tensors.h"

namespace resnet_fused::cpu {

// For x of this type: those of the widest vectors that have its products; null where there are none.
const Kernels* kernels_for(ScalarType x);

bool has_amx();

// The type of packed weights for x.
inline ScalarType weight_type(ScalarType x) {
  if (x == ScalarType::Byte) return ScalarType::Char;
  return x == ScalarType::BFloat16 && kernels_for(x)->widens ? ScalarType::Float : x;
}

}  // namespace resnet_fused::cpu
