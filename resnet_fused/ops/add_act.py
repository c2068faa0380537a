"""The residual join."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops.arithmetic import like, up
from resnet_fused.ops.registry import register


class Args(NamedTuple):
    x: Tensor
    other: Tensor
    relu: bool


def reference(a: Args) -> Tensor:
    """y = round(act(x + other))"""
    value = up(a.x) + up(a.other)
    return like(value.relu() if a.relu else value, a.x)


def fake(a: Args) -> Tensor:
    return torch.empty_like(a.x)


register(__name__, kernels=("triton", "cuda"))
