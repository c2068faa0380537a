// Memory of results that is kept when they are freed: its pages need not be asked for, and zeroed, again.
#pragma once

#include <cstddef>

namespace resnet_fused::cpu {

// At least `bytes`, aligned to a cache line. Throws std::bad_alloc.
void* take(size_t bytes);

// Takes back what `take` gave, from any thread.
void give_back(void* memory) noexcept;

}  // namespace resnet_fused::cpu
