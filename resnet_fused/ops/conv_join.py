"""The last convolution of a bottleneck and its projection in one accumulator, for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.dispatch.conv import ConvShape, uses_tf32
from resnet_fused.dispatch.conv_chain import join_flags
from resnet_fused.dispatch.table import Problem
from resnet_fused.ops import conv_fprop
from resnet_fused.ops.arithmetic import per_channel, up
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_like, refuse_operands, refuse_vectors
from resnet_fused.ops.registry import FlopCount, Pair, register


class Args(NamedTuple):
    x: Tensor  # [N, C, P, Q], NHWC
    weight: Tensor  # [K, C, 1, 1]
    shortcut: Tensor  # [N, D, H, W], NHWC; P = ceil(H / stride), Q likewise
    shortcut_weight: Tensor  # [K, D, 1, 1]
    shift: Tensor  # [K]
    shortcut_stride: Pair  # of its convolution, (h, w)
    relu: bool  # whether act is ReLU, which keeps NaN; else the identity


def reference(a: Args) -> Tensor:
    """y = round(act(conv1x1(x, weight) + conv1x1(shortcut, shortcut_weight, shortcut_stride) + shift)): both products
    in one accumulator, so that the projection never touches memory
    """
    with torch.autocast(a.x.device.type, enabled=False):
        projection = F.conv2d(up(a.shortcut), up(a.shortcut_weight), None, a.shortcut_stride)
        y = F.conv2d(up(a.x), up(a.weight)) + projection
    y = y + per_channel(a.shift)
    return (y.relu() if a.relu else y).to(a.x.dtype)


def sequence(a: Args, fprop: Callable[[conv_fprop.Args], Tensor]) -> Tensor:
    """The projection and what it is added to, each by `fprop`."""
    one, zero = (1, 1), (0, 0)
    projection = conv_fprop.Args(
        a.shortcut, a.shortcut_weight, None, None, None, a.shortcut_stride, zero, one, 1, act=None
    )
    act = "relu" if a.relu else None
    return fprop(conv_fprop.Args(a.x, a.weight, None, a.shift, fprop(projection), one, zero, one, 1, act))


def fake(a: Args) -> Tensor:
    return F.conv2d(a.x, a.weight)


def native(a: Args) -> Tensor:
    return sequence(a, conv_fprop.native)


def problems(a: Args) -> tuple[Problem, ...]:
    n, channels, h, w = a.x.shape
    outputs, shortcut_channels = a.shortcut_weight.shape[:2]
    shape = ConvShape(n, channels, h, w, outputs, 1, 1)
    flags = join_flags(shortcut_channels, a.shortcut_stride[0])
    return (Problem("conv_join", shape, a.x.dtype, uses_tf32(a.x.dtype), flags),)


def refuse(a: Args) -> str | None:
    return (
        refuse_operands(a.x, a.weight)
        or refuse_operands(a.shortcut, a.shortcut_weight)
        or refuse_pointwise(a.x, a.weight, a.shortcut, a.shortcut_weight, a.shortcut_stride)
        or refuse_vectors(a.x.device, a.weight.shape[0], shift=a.shift)
    )


def refuse_pointwise(
    x: Tensor, weight: Tensor, shortcut: Tensor, shortcut_weight: Tensor, shortcut_stride: Pair
) -> str | None:
    """Why operands of two convolutions are not those of 1x1 ones with results alike, or None."""
    outputs, inputs = weight.shape[0], x.shape[1]
    if tuple(weight.shape[1:]) != (inputs, 1, 1) or 0 in (inputs, outputs):
        return f"weight must be [outputs, {inputs}, 1, 1], got {tuple(weight.shape)}"
    wanted = (outputs, shortcut.shape[1], 1, 1)
    if tuple(shortcut_weight.shape) != wanted or shortcut.shape[1] == 0:
        return f"shortcut_weight must be {wanted}, got {tuple(shortcut_weight.shape)}"
    size = [-(-extent // step) for extent, step in zip(shortcut.shape[2:], shortcut_stride, strict=True)]
    if [shortcut.shape[0], *size] != [x.shape[0], *x.shape[2:]]:
        strided = f"shortcut {tuple(shortcut.shape)} with stride {tuple(shortcut_stride)}"
        return f"{strided} does not have the pixels of x {tuple(x.shape)}"
    return refuse_like(x, tuple(shortcut.shape), shortcut=shortcut)


def flops(a: Args, y: Tensor, count: FlopCount) -> int:
    shortcut = count(a.shortcut.shape, a.shortcut_weight.shape, y.shape)
    return shortcut + count(a.x.shape, a.weight.shape, y.shape)


OPTIONS = {"relu": (False, True)}


def case(make: Operands, s: ConvShape, shortcut_channels: int = 0, shortcut_stride: int = 1, relu: bool = True) -> Args:
    """Sample arguments.

    Args:
        shortcut_channels: of the projection's input; 0 for as many as there are outputs.
    """
    channels = shortcut_channels or s.k
    return Args(
        x=make.activation(*s.image),
        weight=make.weight(*s.filter),
        shortcut=make.activation(s.n, channels, s.p * shortcut_stride, s.q * shortcut_stride),
        shortcut_weight=make.weight(s.k, channels, 1, 1),
        shift=make.vector(s.k),
        shortcut_stride=(shortcut_stride, shortcut_stride),
        relu=relu,
    )


register(__name__, triton="conv_join")
