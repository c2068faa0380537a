"""The input gradient of the stem's batch norm, ReLU and max pool."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops import bn_act_max_pool
from resnet_fused.ops.arithmetic import input_gradient, unpool
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_half
from resnet_fused.ops.registry import Size, register


class Args(NamedTuple):
    dy: Tensor  # [N, C, P, Q], of the pooled output
    index: Tensor  # type: ignore[assignment]  # uint8, like dy, of `bn_act_max_pool`
    x: Tensor  # [N, C, H, W], what the batch norm normalised
    scale: Tensor  # [C] fp32; so are all vectors
    shift: Tensor
    mean: Tensor
    invstd: Tensor
    sum_dy: Tensor | None  # with sum_dy_xhat, or None: the statistics were constants
    sum_dy_xhat: Tensor | None
    count: float  # type: ignore[assignment]  # pixels that the sums run over


def reference(a: Args) -> Tensor:
    """dx of `bn_backward_apply` over dz: each window's gradient at its winner, behind ReLU's mask"""
    dz = unpool(a.dy, a.index, a.x, a.scale, a.shift)
    return input_gradient(dz, a.x, a.scale, a.mean, a.invstd, a.sum_dy, a.sum_dy_xhat, a.count)


def fake(a: Args) -> Tensor:
    return torch.empty_like(a.x)


def refuse(a: Args) -> str | None:
    vectors = {"scale": a.scale, "shift": a.shift, "mean": a.mean, "invstd": a.invstd}
    sums = {"sum_dy": a.sum_dy, "sum_dy_xhat": a.sum_dy_xhat}
    return refuse_half(**sums) or bn_act_max_pool.refuse_backward(a.dy, a.index, a.x, **vectors, **sums)


OPTIONS = {"constant": (True, False)}


def case(make: Operands, size: Size, constant: bool = False) -> Args:
    """Sample arguments.

    Args:
        constant: the statistics were constants, and there are no sums.
    """
    n, c, h, w = size
    a, (y, index) = bn_act_max_pool.pooled(make, size)
    return Args(
        dy=make.activation(*y.shape),
        index=index,
        x=a.x,
        scale=a.scale,
        shift=a.shift,
        mean=make.vector(c),
        invstd=make.vector(c, positive=True),
        sum_dy=None if constant else make.vector(c),
        sum_dy_xhat=None if constant else make.vector(c),
        count=float(n * h * w),
    )


register(__name__, triton="bn_act_max_pool_backward", cuda=True, cpu=True)
