"""The data gradient of a block's first convolution, with the sums of the batch norms that end the block before."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.ops import comparison, conv_dgrad
from resnet_fused.ops.arithmetic import gradient_sums, memory_format, select, unpack_bits, up, vector
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
    x: Tensor
    mask: Tensor
    mean: Tensor
    invstd: Tensor
    shortcut: Tensor | None
    shortcut_mean: Tensor | None
    shortcut_invstd: Tensor | None
    size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


class Out(NamedTuple):
    dx: Tensor
    sum_dz: Tensor
    sum_dz_xhat: Tensor
    sum_dz_shortcut: Tensor


def reference(a: Args) -> Out:
    """dx of `conv_dgrad`, unmasked, and over dz = mask ? dx : 0 (a select, of dx as it was rounded) the sums
    `bn_backward_reduce` would find for x and, behind the same mask, for the projection `shortcut`; without it the last
    is empty.
    """
    before = (a.dy, a.weight, a.dy_x, a.dy_coefficients, a.residual, a.residual_mask)
    geometry = (a.size, a.stride, a.padding, a.dilation, a.groups)
    dx = conv_dgrad.reference(conv_dgrad.Args(*before, None, None, None, None, None, *geometry)).dx
    dz = select(unpack_bits(a.mask, a.x), up(dx))
    sums = gradient_sums(dz, a.x, a.mean, a.invstd)
    if a.shortcut is None or a.shortcut_mean is None or a.shortcut_invstd is None:
        return Out(dx, *sums, dz.new_empty(0))
    return Out(dx, *sums, gradient_sums(dz, a.shortcut, a.shortcut_mean, a.shortcut_invstd)[1])


def fake(a: Args) -> Out:
    channels = a.weight.shape[1] * a.groups
    size, order = (a.dy.shape[0], channels, *a.size), memory_format(a.dy)
    dx = torch.empty(size, dtype=a.dy.dtype, device=a.dy.device, memory_format=order)
    shortcut = 0 if a.shortcut is None else channels
    return Out(dx, vector(a.dy, channels), vector(a.dy, channels), vector(a.dy, shortcut))


OPTIONS = {"prologue": (False, True), "epilogue": ("", "masked residual"), "projection": (False, True)}


def case(make: Operands, s: ConvShape, prologue: bool = False, epilogue: str = "", projection: bool = True) -> Args:
    """Sample arguments.

    Args:
        prologue, epilogue: as in `conv_dgrad`, without `"batch norm"`.
        projection: the block before ends in the sum of two batch norms.
    """
    a = conv_dgrad.case(make, s, prologue, epilogue)
    return Args(
        dy=a.dy,
        weight=a.weight,
        dy_x=a.dy_x,
        dy_coefficients=a.dy_coefficients,
        residual=a.residual,
        residual_mask=a.residual_mask,
        x=make.activation(*s.image),
        mask=make.bits(math.prod(s.image)),
        mean=make.vector(s.c),
        invstd=make.vector(s.c, positive=True),
        shortcut=make.activation(*s.image) if projection else None,
        shortcut_mean=make.vector(s.c) if projection else None,
        shortcut_invstd=make.vector(s.c, positive=True) if projection else None,
        size=a.size,
        stride=a.stride,
        padding=a.padding,
        dilation=a.dilation,
        groups=a.groups,
    )


def compare(a: Args, actual: Out, plain: Out, truth: Out) -> list[Comparison]:
    exact = comparison.double(a)
    dz = torch.where(unpack_bits(a.mask, a.x), actual.dx.double(), 0)
    found = [Comparison("dx", actual.dx, plain.dx, truth.dx)]
    found += comparison.gradient_sums(dz, exact.x, exact.mean, exact.invstd, actual[1:3])
    if exact.shortcut is not None and exact.shortcut_mean is not None and exact.shortcut_invstd is not None:
        norm = (exact.shortcut, exact.shortcut_mean, exact.shortcut_invstd)
        found += comparison.gradient_sums(dz, *norm, (actual.sum_dz, actual.sum_dz_shortcut))[1:]
    return found


register(__name__, kernels=("triton",))
