"""A filter in the memory order that a kernel reads."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from resnet_fused.ops.registry import register


class Args(NamedTuple):
    weight: Tensor
    flip: bool


def reference(a: Args) -> Tensor:
    """KRSC copy, contiguous [K, R, S, C]; flip: [C, R, S, K] with r, s reversed (for dgrad)"""
    if a.flip:
        return a.weight.flip(2, 3).permute(1, 2, 3, 0).contiguous()
    return a.weight.permute(0, 2, 3, 1).contiguous()


def fake(a: Args) -> Tensor:
    k, c, r, s = a.weight.shape
    return a.weight.new_empty((c, r, s, k) if a.flip else (k, r, s, c))


register(__name__, kernels=("triton", "cuda"))
