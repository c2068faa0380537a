// How the elementwise kernels walk an activation: octets of consecutive elements in memory order, a persistent grid,
// several octets in flight.
#pragma once

#include "device.cuh"

namespace resnet_fused {

// How the channel of an element follows from its place in memory: (i / inner) % C, with inner = 1 in NHWC and H*W in
// NCHW.
//   kOctet: NHWC, C a multiple of 8. A thread steps by whole pixels, keeps its octet of channels and their parameters
//   in registers. kPlane: NCHW, H*W a multiple of 8. All of an octet has one channel. kEach:  anything else, and bases
//   that are not 16-byte aligned. Each element has its own channel.
enum class Channels { kOctet, kPlane, kEach };

struct Walk {
  int64_t count, octets, step;
  Divider inner, channels, channel_octets;
  bool aligned;

  // Where a thread starts; at `octets` or beyond, it has nothing to do.
  __device__ __forceinline__ int64_t first() const {
    const int64_t id = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    return id < step ? id : octets;
  }
  template <Channels kChannels>
  __device__ __forceinline__ void channels_of(int64_t octet, int64_t (&c)[8]) const {
    if constexpr (kChannels == Channels::kOctet) {
      const int64_t first = 8 * channel_octets.remainder(octet);
#pragma unroll
      for (int j = 0; j < 8; ++j) c[j] = first + j;
    } else {
      const int64_t plane = inner.quotient(8 * octet);
      int64_t within = 8 * octet - plane * inner.d, channel = channels.remainder(plane);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        c[j] = channel;
        if (kChannels == Channels::kEach && ++within == inner.d) {
          within = 0;
          channel = channel + 1 == channels.d ? 0 : channel + 1;
        }
      }
    }
  }
};

// A per-channel vector at the eight channels of an octet; a null vector is `otherwise` everywhere.
__device__ __forceinline__ void gather(float (&out)[8], const float* __restrict__ vector, const int64_t (&c)[8],
                                       float otherwise) {
#pragma unroll
  for (int j = 0; j < 8; ++j) out[j] = vector == nullptr ? otherwise : __ldg(vector + c[j]);
}

}  // namespace resnet_fused
