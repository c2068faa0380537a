"""The sum of partial rows in a fixed order."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from resnet_fused.ops.registry import register


class Args(NamedTuple):
    partials: Tensor


def reference(a: Args) -> Tensor:
    """sum over dimension 0 in fp32, fixed order; [rows, ...] -> [...]"""
    return a.partials.sum(0)


def fake(a: Args) -> Tensor:
    return a.partials.new_empty(a.partials.shape[1:])


register(__name__, kernels=("triton", "cuda"))
