// Runs CUDA C++ kernels on the CPU, for tests: an OS thread runs one block at a time and the block's threads are
// fibres.
//
// A fibre runs until it must wait for the others (a barrier, a shuffle, a ballot), so that a missing barrier shows as a
// read of poison or of stale data. The order of the fibres is reshuffled at every step by RESNET_FUSED_HOST_SEED.
// Shared memory starts as NaN and lies on the heap, where AddressSanitizer sees its ends. A barrier that not all
// threads of the block reach, or that they reach in different places, throws.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace host {

// What `threadIdx`, `blockIdx`, `blockDim` and `gridDim` read: one per OS thread, switched with the fibres.
struct Index {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
Index& index();

// Runs `kernel` once for every thread of the grid. Throws std::runtime_error where a GPU would refuse the launch, hang,
// or be undefined.
void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& kernel);

void block_barrier(const char* file, int line);
// Every lane of the warp hands in a value; returns what `lane` handed in (its own value for a lane that does not
// exist).
uint64_t exchange(unsigned mask, uint64_t value, unsigned lane, const char* file, int line);
unsigned ballot(unsigned mask, bool predicate, const char* file, int line);
unsigned lane_id();

// The block's array of `bytes` declared at the place that `site` names; NaN when the block first touches it.
void* shared_array(const void* site, size_t bytes);
void* dynamic_shared();

}  // namespace host
