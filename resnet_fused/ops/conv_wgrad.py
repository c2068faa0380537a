"""The weight gradient of a convolution, between the batch norms on both of its sides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.ops import comparison
from resnet_fused.ops.arithmetic import activation, bn_gradient, vector
from resnet_fused.ops.comparison import Comparison
from resnet_fused.ops.operands import Operands
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


OPTIONS = {"x_prologue": (False, True), "dy_prologue": (False, True)}


def case(make: Operands, s: ConvShape, x_prologue: bool = False, dy_prologue: bool = False) -> Args:
    """Sample arguments.

    Args:
        x_prologue: the input is normalised on the way in.
        dy_prologue: the backward of the batch norm on dy's side is applied on the way in.
    """
    stride, padding, dilation, groups = s.geometry
    return Args(
        dy=make.activation(*s.output),
        x=make.activation(*s.image),
        dy_x=make.activation(*s.output) if dy_prologue else None,
        dy_coefficients=make.coefficients(s.k) if dy_prologue else None,
        x_scale=make.vector(s.c, positive=True) if x_prologue else None,
        x_shift=make.vector(s.c) if x_prologue else None,
        filter=(s.r, s.s),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


def compare(a: Args, actual: Tensor, plain: Tensor, truth: Tensor) -> list[Comparison]:
    terms = reference(comparison.map_tensors(a, lambda t: t.double().abs()))
    return [Comparison("dweight", actual, plain, truth, terms)]


register(__name__, kernels=("triton",))
