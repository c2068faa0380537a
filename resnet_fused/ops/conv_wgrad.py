"""The weight gradient of a convolution, between the batch norms on both of its sides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from resnet_fused.ops.arithmetic import activation, bn_gradient, vector
from resnet_fused.ops.registry import Pair, register


class Args(NamedTuple):
    dy: Tensor
    x: Tensor
    dy_x: Tensor | None
    dy_coefficients: Tensor | None
    x_scale: Tensor | None
    x_shift: Tensor | None
    filter: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


def reference(a: Args) -> Tensor:
    """the gradient of the weight for g as in `conv_dgrad` and a as in `conv_fprop_stats`; fp32 (never rounded to the
    data's dtype), [K, C/groups, R, S] in KRSC memory order. The pixels are split and summed in a fixed order:
    deterministic.
    """
    size = [a.dy.shape[1], a.x.shape[1] // a.groups, *a.filter]
    with torch.autocast(a.x.device.type, enabled=False):
        x, gradient = activation(a.x, a.x_scale, a.x_shift), bn_gradient(a.dy, a.dy_x, a.dy_coefficients)
        dweight = conv2d_weight(x, size, gradient, a.stride, a.padding, a.dilation, a.groups)
    return dweight.contiguous(memory_format=torch.channels_last)


def fake(a: Args) -> Tensor:
    size = (a.dy.shape[1], a.x.shape[1] // a.groups, *a.filter)
    return vector(a.x, *size).contiguous(memory_format=torch.channels_last)


register(__name__, kernels=("triton",))
