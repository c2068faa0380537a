"""The last convolution of a bottleneck and its projection in one accumulator, for inference."""

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
    shortcut: Tensor
    shortcut_weight: Tensor
    shift: Tensor
    shortcut_stride: Pair
    relu: bool


def reference(a: Args) -> Tensor:
    """y = round(act(conv1x1(x, weight) + conv1x1(shortcut, shortcut_weight, shortcut_stride) + shift)): both products
    in one accumulator, so that the projection never touches memory
    """
    with torch.autocast(a.x.device.type, enabled=False):
        projection = F.conv2d(up(a.shortcut), up(a.shortcut_weight), None, a.shortcut_stride)
        y = F.conv2d(up(a.x), up(a.weight)) + projection
    y = y + per_channel(a.shift)
    return (y.relu() if a.relu else y).to(a.x.dtype)


def fake(a: Args) -> Tensor:
    return F.conv2d(a.x, a.weight)


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


register(__name__, kernels=("triton",))
