"""The data gradient of a convolution, with the backward of the batch norms on both of its sides."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.ops import comparison
from resnet_fused.ops.arithmetic import (
    bn_gradient,
    gradient_sums,
    memory_format,
    passes_relu,
    rounded,
    select,
    unpack_bits,
    up,
    vector,
)
from resnet_fused.ops.comparison import Comparison
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.registry import Pair, register


class Args(NamedTuple):
    dy: Tensor
    weight: Tensor
    dy_x: Tensor | None
    dy_coefficients: Tensor | None
    residual: Tensor | None
    residual_mask: Tensor | None
    x: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    mean: Tensor | None
    invstd: Tensor | None
    size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


class Out(NamedTuple):
    dx: Tensor
    sum_dx: Tensor
    sum_dx_xhat: Tensor


def reference(a: Args) -> Out:
    """g = dy, or with dy_x and dy_coefficients = (a, b, c), [3, K], the batch norm's gradient
    g = round(a*dy + b*dy_x + c), zero outside the image. dx = the gradient of conv(., weight) for g, [N, C, *size],
    plus residual: all of it, or where residual_mask (bits as in `bn_apply`) has a 1. With x, scale, shift, mean,
    invstd - the batch norm and ReLU that made the convolution's input a = relu(x*scale + shift) - dx passes only where
    not (round(x*scale + shift) <= 0) (a select), and sum_dx = sum(dx), sum_dx_xhat = sum(dx * (x - mean) * invstd),
    [C] each, of dx as it was rounded. Without them the sums are empty tensors. residual and x exclude each other.
    """
    size = [a.dy.shape[0], a.weight.shape[1] * a.groups, *a.size]
    with torch.autocast(a.dy.device.type, enabled=False):
        gradient = bn_gradient(a.dy, a.dy_x, a.dy_coefficients)
        dx = conv2d_input(size, up(a.weight), gradient, a.stride, a.padding, a.dilation, a.groups)
    if a.residual is not None:
        addend = up(a.residual)
        dx = dx + (addend if a.residual_mask is None else select(unpack_bits(a.residual_mask, a.residual), addend))
    if a.x is None or a.scale is None or a.shift is None or a.mean is None or a.invstd is None:
        return Out(rounded(dx, a.dy), dx.new_empty(0), dx.new_empty(0))
    dx = rounded(select(passes_relu(a.x, a.scale, a.shift), dx), a.dy)
    return Out(dx, *gradient_sums(up(dx), a.x, a.mean, a.invstd))


def fake(a: Args) -> Out:
    channels = a.weight.shape[1] * a.groups
    size, order = (a.dy.shape[0], channels, *a.size), memory_format(a.dy)
    dx = torch.empty(size, dtype=a.dy.dtype, device=a.dy.device, memory_format=order)
    sums = channels if a.x is not None else 0
    return Out(dx, vector(a.dy, sums), vector(a.dy, sums))


OPTIONS = {"prologue": (False, True), "epilogue": ("", "residual", "masked residual", "batch norm")}


def case(make: Operands, s: ConvShape, prologue: bool = False, epilogue: str = "") -> Args:
    """Sample arguments.

    Args:
        prologue: the backward of the batch norm on dy's side is applied on the way in.
        epilogue: `""`; `"residual"`, or `"masked residual"` for one with bits; `"batch norm"` for ReLU's mask and the
            sums.
    """
    stride, padding, dilation, groups = s.geometry
    norm = epilogue == "batch norm"
    return Args(
        dy=make.activation(*s.output),
        weight=make.weight(*s.filter),
        dy_x=make.activation(*s.output) if prologue else None,
        dy_coefficients=make.coefficients(s.k) if prologue else None,
        residual=make.activation(*s.image) if "residual" in epilogue else None,
        residual_mask=make.bits(math.prod(s.image)) if "masked" in epilogue else None,
        x=make.activation(*s.image) if norm else None,
        scale=make.vector(s.c, positive=True) if norm else None,
        shift=make.vector(s.c) if norm else None,
        mean=make.vector(s.c) if norm else None,
        invstd=make.vector(s.c, positive=True) if norm else None,
        size=(s.h, s.w),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


def compare(a: Args, actual: Out, plain: Out, truth: Out) -> list[Comparison]:
    found = [Comparison("dx", actual.dx, plain.dx, truth.dx)]
    if a.x is not None and a.mean is not None and a.invstd is not None:
        x, mean, invstd = a.x.double(), a.mean.double(), a.invstd.double()
        found += comparison.gradient_sums(actual.dx.double(), x, mean, invstd, actual[1:])
    return found


register(__name__, kernels=("triton",))
