// Chooses how an elementwise kernel walks an activation.
#pragma once

#include "elementwise.cuh"
#include "launch.h"

namespace resnet_fused {

inline Channels channels_kind(const Activation& a, bool aligned) {
  if (aligned && a.nhwc && a.C % 8 == 0) return Channels::kOctet;
  if (aligned && !a.nhwc && a.H * a.W % 8 == 0) return Channels::kPlane;
  return Channels::kEach;
}

template <class Kernel>
std::tuple<unsigned, Walk> make_walk(const Device& device, Kernel kernel, const Activation& a, Channels channels,
                                     bool aligned) {
  const int64_t octets = (a.count() + 7) / 8, channel_octets = channels == Channels::kOctet ? a.C / 8 : 1;
  Walk walk{a.count(), octets, 0, Divider(a.nhwc ? 1 : a.H * a.W), Divider(a.C), Divider(channel_octets), aligned};
  const unsigned grid = persistent_grid(device, kernel, octets, channel_octets, walk.step);
  return {grid, walk};
}

// Calls f with the kind of channels as a constant.
template <class F>
void dispatch(Channels channels, F f) {
  if (channels == Channels::kOctet) {
    f(std::integral_constant<Channels, Channels::kOctet>());
  } else if (channels == Channels::kPlane) {
    f(std::integral_constant<Channels, Channels::kPlane>());
  } else {
    f(std::integral_constant<Channels, Channels::kEach>());
  }
}

}  // namespace resnet_fused
