"""The gradient of the residual join."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops.arithmetic import like, select
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_activations
from resnet_fused.ops.registry import Size, register


class Args(NamedTuple):
    dy: Tensor  # like y
    y: Tensor  # [N, C, H, W], what `add_act` returned


def reference(a: Args) -> Tensor:
    """dz = not (y <= 0) ? dy : 0, the gradient of both summands"""
    return like(select(~(a.y <= 0), a.dy), a.y)


def fake(a: Args) -> Tensor:
    return torch.empty_like(a.y)


def refuse(a: Args) -> str | None:
    return refuse_activations(a.dy, y=a.y)


def case(make: Operands, size: Size) -> Args:
    return Args(make.activation(*size), make.activation(*size))


register(__name__, triton="add_act", cuda=True, cpu=True)
