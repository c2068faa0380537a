"""Both gradients of a convolution between two batch norms."""

from __future__ import annotations

from resnet_fused.dispatch.conv import ConvConfig
from resnet_fused.kernels import conv_dgrad, conv_wgrad
from resnet_fused.kernels._launch import empty_nhwc
from resnet_fused.kernels.reduce_rows import reduce_alike
from resnet_fused.ops.conv_backward import Args, Out, dgrad_args, wgrad_args
from resnet_fused.ops.conv_dgrad import conv_shape


def conv_backward(a: Args, dgrad: ConvConfig, wgrad: ConvConfig) -> Out:
    """Launch `ops.conv_backward`; what both gradients leave in parts is added in one launch."""
    activation = None if a.x_prologue else empty_nhwc(a.x, *a.x.shape)
    given = dgrad_args(a)
    dx, *partials = conv_dgrad.run(given, conv_shape(given), dgrad, activation)
    ranges = conv_wgrad.run(wgrad_args(a, activation), wgrad)
    split = ranges.shape[0] > 1
    sum_dx, sum_dx_xhat, *dweight = reduce_alike(*partials, other=ranges if split else None)
    return Out(dx, sum_dx, sum_dx_xhat, (dweight[0] if split else ranges[0]).permute(0, 3, 1, 2))
