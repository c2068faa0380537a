"""The two sums that the backward of the stem's batch norm needs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from resnet_fused.ops.arithmetic import gradient_sums, unpool, vector
from resnet_fused.ops.registry import register


class Args(NamedTuple):
    dy: Tensor
    index: Tensor  # type: ignore[assignment]
    x: Tensor
    scale: Tensor
    shift: Tensor
    mean: Tensor
    invstd: Tensor
    rows: int


class Out(NamedTuple):
    sum_dy: Tensor
    sum_dy_xhat: Tensor


def reference(a: Args) -> Out:
    """the sums of `bn_backward_reduce` over dz: each window's gradient at its winner, behind ReLU's mask"""
    return Out(*gradient_sums(unpool(a.dy, a.index, a.x, a.scale, a.shift), a.x, a.mean, a.invstd))


def fake(a: Args) -> Out:
    return Out(vector(a.x, a.x.shape[1]), vector(a.x, a.x.shape[1]))


register(__name__, kernels=("triton", "cuda"))
