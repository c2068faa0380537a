"""The residual join."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops.arithmetic import like, up
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_activations
from resnet_fused.ops.registry import Size, register


class Args(NamedTuple):
    x: Tensor  # [N, C, H, W]
    other: Tensor  # like x
    relu: bool  # whether act is ReLU, which keeps NaN; else the identity


def reference(a: Args) -> Tensor:
    """y = round(act(x + other))"""
    value = up(a.x) + up(a.other)
    return like(value.relu() if a.relu else value, a.x)


def fake(a: Args) -> Tensor:
    return torch.empty_like(a.x)


def refuse(a: Args) -> str | None:
    return refuse_activations(a.x, other=a.other)


def case(make: Operands, size: Size, relu: bool = True) -> Args:
    return Args(make.activation(*size), make.activation(*size), relu)


register(__name__, triton="add_act", cuda=True, cpu=True)
