"""Both gradients of a block's first convolution, with the sums of the batch norms that end the block before."""

from __future__ import annotations

import torch

from resnet_fused.dispatch.conv import ConvConfig
from resnet_fused.kernels import conv_dgrad, conv_wgrad
from resnet_fused.kernels.reduce_rows import reduce_alike
from resnet_fused.ops.conv_dgrad import conv_shape
from resnet_fused.ops.conv_dgrad_join import Args, Out, dgrad_args, wgrad_args


def conv_dgrad_join(a: Args, dgrad: ConvConfig, wgrad: ConvConfig | None = None) -> Out:
    """Launch `ops.conv_dgrad_join`; what both gradients leave in parts is added in one launch."""
    dx, *partials = conv_dgrad.run(a, conv_shape(dgrad_args(a)), dgrad)
    given = wgrad_args(a)
    ranges = None if given is None or wgrad is None else conv_wgrad.run(given, wgrad)
    split = ranges is not None and ranges.shape[0] > 1
    sum_dz, sum_dz_xhat, *more = reduce_alike(*partials, other=ranges if split else None)
    nothing = dx.new_empty(0, dtype=torch.float32)
    dweight = nothing if ranges is None else (more.pop() if split else ranges[0]).permute(0, 3, 1, 2)
    return Out(dx, sum_dz, sum_dz_xhat, more[0] if more else nothing, dweight)
