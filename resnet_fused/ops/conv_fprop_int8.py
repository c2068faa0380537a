"""A convolution of int8 operands with the epilogue of `conv_fprop`, rounded to int8 again."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.dispatch.conv import ConvShape, conv_refusal
from resnet_fused.dispatch.table import Problem
from resnet_fused.ops.activations import ACTIVATIONS, activate
from resnet_fused.ops.arithmetic import nhwc, per_channel, round_to_grid
from resnet_fused.ops.comparison import on_grid
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import (
    refuse_act,
    refuse_grids,
    refuse_groups,
    refuse_like,
    refuse_operands,
    refuse_products,
    refuse_vectors,
)
from resnet_fused.ops.registry import FlopCount, Pair, register


class Args(NamedTuple):
    x: Tensor  # int8 [N, C, H, W], NHWC
    x_zero: Tensor  # int8 [C]: what stands for zero, and pads
    weight: Tensor  # int8 [K, C/groups, R, S], any strides; one that is not NHWC is copied
    offset: Tensor  # int32 [K]: minus what x_zero alone would add up to
    scale: Tensor  # fp32 [K]
    shift: Tensor  # fp32 [K]
    residual: Tensor | None  # int8 [N, K, P, Q], NHWC, or None
    residual_scale: float  # the residual is residual_scale * (residual - residual_zero)
    residual_zero: int
    stride: Pair  # of the filter, (h, w); so are padding, with x_zero, and dilation
    padding: Pair
    dilation: Pair
    groups: int
    act: str | None  # one of `ACTIVATIONS`, or None for the identity
    y_scale: float  # of an int8 result, y_scale * (q - y_zero)
    y_zero: int
    dtype: torch.dtype  # of the result: int8, or a float one


def reference(a: Args) -> Tensor:
    """y = act(scale * (conv(x, weight) + offset) + shift + residual_scale * (residual - residual_zero)): int32 sums,
    the rest in fp32. The result is y, or in int8 q = clip(round(y / y_scale + y_zero), -128, 127), ties to even
    """
    return _finished(a, _sums(a, torch.float64))


def native(a: Args) -> Tensor:
    """Native PyTorch has no such convolution on a GPU: one of floats, between passes of their own."""
    return _finished(a, _sums(a, torch.float32))


def _sums(a: Args, dtype: torch.dtype) -> Tensor:
    """conv(x, weight) + offset, in this dtype."""
    (n, c, h, w), (rows, columns) = a.x.shape, a.padding
    x = per_channel(a.x_zero.to(dtype)).expand(n, c, h + 2 * rows, w + 2 * columns).clone()
    x[:, :, rows : rows + h, columns : columns + w] = a.x
    with torch.autocast(a.x.device.type, enabled=False):
        return F.conv2d(x, a.weight.to(dtype), a.offset.to(dtype), a.stride, 0, a.dilation, a.groups)


def _finished(a: Args, sums: Tensor) -> Tensor:
    """Of sums the result; before it is rounded, where `scale` is float64."""
    y = sums.to(a.scale.dtype) * per_channel(a.scale) + per_channel(a.shift)
    if a.residual is not None:
        y = y + (a.residual.to(y.dtype) - a.residual_zero) * a.residual_scale
    return finish(activate(y, a.act), a.y_scale, a.y_zero, a.dtype)


def finish(y: Tensor, scale: float, zero: int, dtype: torch.dtype) -> Tensor:
    """`y` in `dtype`, int8 on a grid, and in NHWC order; float64 stays as it is."""
    if y.dtype != torch.float64:
        y = round_to_grid(y, scale, zero) if dtype == torch.int8 else y.to(dtype)
    return nhwc(y)


def fake(a: Args) -> Tensor:
    shape = conv_shape(a).output
    return torch.empty(shape, dtype=a.dtype, device=a.x.device, memory_format=torch.channels_last)


def conv_shape(a: Args) -> ConvShape:
    return ConvShape.of(a.x.shape, a.weight.shape, a.stride, a.padding, a.dilation, a.groups)


def problems(a: Args) -> tuple[Problem, ...]:
    return (Problem("conv_fprop_int8", conv_shape(a), torch.int8),)


def refuse(a: Args) -> str | None:
    reason = refuse_act(a.act) or refuse_operands(a.x, a.weight, (torch.int8,))
    reason = reason or refuse_groups(a.weight, a.x.shape[1], a.groups) or refuse_products(a.weight)
    if reason is not None:
        return reason
    shape, device = conv_shape(a), a.x.device
    return (
        conv_refusal(shape)
        or refuse_like(a.x, shape.output, residual=a.residual)
        or refuse_vectors(device, shape.c, torch.int8, x_zero=a.x_zero)
        or refuse_vectors(device, shape.k, torch.int32, offset=a.offset)
        or refuse_vectors(device, shape.k, torch.float32, scale=a.scale, shift=a.shift)
        or refuse_grids(a.dtype, residual=(a.residual_scale, a.residual_zero), y=(a.y_scale, a.y_zero))
    )


def flops(a: Args, y: Tensor, count: FlopCount) -> int:
    return count(a.x.shape, a.weight.shape, y.shape)


compare = on_grid
OPTIONS = {"residual": (False, True), "act": (None, *ACTIVATIONS), "rounded": (False, True)}


def case(make: Operands, s: ConvShape, residual: bool = False, act: str | None = "relu", rounded: bool = True) -> Args:
    """Sample arguments.

    Args:
        rounded: the result is in int8; else in the dtype of other operands.
    """
    stride, padding, dilation, groups = s.geometry
    _, *filter = s.filter
    spread = make.spread(*filter)
    return Args(
        x=make.int8(*s.image),
        x_zero=make.integers(s.c),
        weight=make.int8(*s.filter),
        offset=make.integers(s.k, dtype=torch.int32, end=spread),
        scale=make.vector(s.k, positive=True, factor=1 / spread),
        shift=make.vector(s.k),
        residual=make.int8(*s.output) if residual else None,
        residual_scale=1 / 64,
        residual_zero=7,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        act=act,
        y_scale=1 / 32,
        y_zero=-11,
        dtype=torch.int8 if rounded else make.dtype,
    )


register(__name__, triton="conv_fprop")
