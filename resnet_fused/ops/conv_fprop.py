"""A convolution with an affine epilogue, residual and ReLU."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.ops.arithmetic import per_channel, up
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.registry import Pair, register


class Args(NamedTuple):
    x: Tensor
    weight: Tensor
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    relu: bool


def reference(a: Args) -> Tensor:
    """y = act(scale * conv(x, weight) + shift + residual), fp32 accumulation and epilogue, rounded once"""
    with torch.autocast(a.x.device.type, enabled=False):
        y = F.conv2d(up(a.x), up(a.weight), None, a.stride, a.padding, a.dilation, a.groups)
    if a.scale is not None:
        y = y * per_channel(a.scale)
    if a.shift is not None:
        y = y + per_channel(a.shift)
    if a.residual is not None:
        y = y + up(a.residual)
    return (y.relu() if a.relu else y).to(a.x.dtype)


def fake(a: Args) -> Tensor:
    # PyTorch's own rule decides the strides: channels_last if either operand is.
    return F.conv2d(a.x, a.weight, None, a.stride, a.padding, a.dilation, a.groups)


OPTIONS = {"scaled": (False, True), "residual": (False, True), "relu": (False, True)}


def case(make: Operands, s: ConvShape, scaled: bool = False, residual: bool = False, relu: bool = True) -> Args:
    """Sample arguments.

    Args:
        scaled: the batch norm's scale is given; else it is folded into the weight.
    """
    stride, padding, dilation, groups = s.geometry
    return Args(
        x=make.activation(*s.image),
        weight=make.weight(*s.filter),
        scale=make.vector(s.k, positive=True) if scaled else None,
        shift=make.vector(s.k),
        residual=make.activation(*s.output) if residual else None,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        relu=relu,
    )


register(__name__, kernels=("triton",))
