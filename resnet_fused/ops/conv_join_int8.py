"""The last convolution of a bottleneck and its projection in one kernel, of int8 operands, rounded to int8 again."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.dispatch.conv_chain import join_flags
from resnet_fused.dispatch.table import Problem
from resnet_fused.ops import conv_fprop_int8
from resnet_fused.ops.arithmetic import per_channel
from resnet_fused.ops.comparison import on_grid
from resnet_fused.ops.conv_join import refuse_pointwise
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_grids, refuse_operands, refuse_products, refuse_vectors
from resnet_fused.ops.registry import FlopCount, Pair, register


class Args(NamedTuple):
    x: Tensor  # int8 [N, C, P, Q], NHWC
    weight: Tensor  # int8 [K, C, 1, 1]
    offset: Tensor  # int32 [K]: minus what the zero of x alone would add up to
    scale: Tensor  # fp32 [K]
    shortcut: Tensor  # int8 [N, D, H, W], NHWC; P = ceil(H / stride), Q likewise
    shortcut_weight: Tensor  # int8 [K, D, 1, 1]
    shortcut_offset: Tensor  # int32 [K]
    shortcut_scale: Tensor  # fp32 [K]
    shift: Tensor  # fp32 [K]
    shortcut_stride: Pair  # of its convolution, (h, w)
    relu: bool  # whether act is ReLU; else the identity
    y_scale: float  # of an int8 result, y_scale * (q - y_zero)
    y_zero: int
    dtype: torch.dtype  # of the result: int8, or a float one


def reference(a: Args) -> Tensor:
    """y = act(scale * (conv1x1(x, weight) + offset) + shortcut_scale * (conv1x1(shortcut, shortcut_weight,
    shortcut_stride) + shortcut_offset) + shift): int32 sums, the rest in fp32; the projection never touches memory.
    The result is y, or in int8 q = clip(round(y / y_scale + y_zero), -128, 127), ties to even
    """
    return _computed(a, torch.float64)


def native(a: Args) -> Tensor:
    """Native PyTorch has no such convolution on a GPU: two of floats, between passes of their own."""
    return _computed(a, torch.float32)


def _computed(a: Args, dtype: torch.dtype) -> Tensor:
    """The result, of sums in this dtype; before it is rounded, where `scale` is float64."""

    def product(x: Tensor, weight: Tensor, offset: Tensor, scale: Tensor, stride: Pair) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            sums = F.conv2d(x.to(dtype), weight.to(dtype), offset.to(dtype), stride)
        return sums.to(scale.dtype) * per_channel(scale)

    y = product(a.x, a.weight, a.offset, a.scale, (1, 1))
    y = y + product(a.shortcut, a.shortcut_weight, a.shortcut_offset, a.shortcut_scale, a.shortcut_stride)
    y = y + per_channel(a.shift)
    return conv_fprop_int8.finish(y.relu() if a.relu else y, a.y_scale, a.y_zero, a.dtype)


def sequence(a: Args, fprop: Callable[[conv_fprop_int8.Args], Tensor]) -> Tensor:
    """The projection, rounded on the grid of the result, and what it is added to, each by `fprop`."""
    one, zero, grid = (1, 1), (0, 0), (a.y_scale, a.y_zero)
    x_zero, shortcut_zero = (torch.zeros_like(t[0, :, 0, 0]) for t in (a.x, a.shortcut))  # nothing is padded
    shift = torch.zeros_like(a.shift)
    operands = (a.shortcut, shortcut_zero, a.shortcut_weight, a.shortcut_offset, a.shortcut_scale, shift)
    residual = fprop(
        conv_fprop_int8.Args(*operands, None, 1.0, 0, a.shortcut_stride, zero, one, 1, None, *grid, torch.int8)
    )
    act, operands = "relu" if a.relu else None, (a.x, x_zero, a.weight, a.offset, a.scale, a.shift)
    return fprop(conv_fprop_int8.Args(*operands, residual, *grid, one, zero, one, 1, act, *grid, a.dtype))


def fake(a: Args) -> Tensor:
    n, _, *image = a.x.shape
    shape = (n, a.weight.shape[0], *image)
    return torch.empty(shape, dtype=a.dtype, device=a.x.device, memory_format=torch.channels_last)


def problems(a: Args) -> tuple[Problem, ...]:
    n, channels, h, w = a.x.shape
    outputs, shortcut_channels = a.shortcut_weight.shape[:2]
    flags = join_flags(shortcut_channels, a.shortcut_stride[0])
    return (Problem("conv_join_int8", ConvShape(n, channels, h, w, outputs, 1, 1), torch.int8, False, flags),)


def refuse(a: Args) -> str | None:
    eight, device, outputs = (torch.int8,), a.x.device, a.weight.shape[0]
    offsets = {"offset": a.offset, "shortcut_offset": a.shortcut_offset}
    floats = {"scale": a.scale, "shortcut_scale": a.shortcut_scale, "shift": a.shift}
    return (
        refuse_operands(a.x, a.weight, eight)
        or refuse_operands(a.shortcut, a.shortcut_weight, eight)
        or refuse_pointwise(a.x, a.weight, a.shortcut, a.shortcut_weight, a.shortcut_stride)
        or refuse_products(a.weight)
        or refuse_products(a.shortcut_weight)
        or refuse_vectors(device, outputs, torch.int32, **offsets)
        or refuse_vectors(device, outputs, torch.float32, **floats)
        or refuse_grids(a.dtype, y=(a.y_scale, a.y_zero))
    )


def flops(a: Args, y: Tensor, count: FlopCount) -> int:
    shortcut = count(a.shortcut.shape, a.shortcut_weight.shape, y.shape)
    return shortcut + count(a.x.shape, a.weight.shape, y.shape)


compare = on_grid
OPTIONS = {"relu": (False, True), "rounded": (False, True)}


def case(
    make: Operands,
    s: ConvShape,
    shortcut_channels: int = 0,
    shortcut_stride: int = 1,
    relu: bool = True,
    rounded: bool = True,
) -> Args:
    """Sample arguments.

    Args:
        shortcut_channels: of the projection's input; 0 for as many as there are outputs.
        rounded: the result is in int8; else in the dtype of other operands.
    """
    channels = shortcut_channels or s.k
    spread, other = make.spread(s.c), make.spread(channels)
    return Args(
        x=make.int8(*s.image),
        weight=make.int8(*s.filter),
        offset=make.integers(s.k, dtype=torch.int32, end=spread),
        scale=make.vector(s.k, positive=True, factor=1 / spread),
        shortcut=make.int8(s.n, channels, s.p * shortcut_stride, s.q * shortcut_stride),
        shortcut_weight=make.int8(s.k, channels, 1, 1),
        shortcut_offset=make.integers(s.k, dtype=torch.int32, end=other),
        shortcut_scale=make.vector(s.k, positive=True, factor=1 / other),
        shift=make.vector(s.k),
        shortcut_stride=(shortcut_stride, shortcut_stride),
        relu=relu,
        y_scale=1 / 32,
        y_zero=-11,
        dtype=torch.int8 if rounded else make.dtype,
    )


register(__name__, triton="conv_join")
