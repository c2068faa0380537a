"""The two sums that the backward of the stem's batch norm needs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from resnet_fused.dispatch.heuristics import partial_rows
from resnet_fused.ops import bn_act_max_pool, comparison
from resnet_fused.ops.arithmetic import gradient_sums, unpool, vector
from resnet_fused.ops.comparison import Comparison
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_rows
from resnet_fused.ops.registry import Size, register


class Args(NamedTuple):
    dy: Tensor  # [N, C, P, Q], of the pooled output
    index: Tensor  # type: ignore[assignment]  # uint8, like dy, of `bn_act_max_pool`
    x: Tensor  # [N, C, H, W], what the batch norm normalised
    scale: Tensor  # [C] fp32; so are all vectors
    shift: Tensor
    mean: Tensor
    invstd: Tensor
    rows: int  # partial sums of each channel


class Out(NamedTuple):
    sum_dy: Tensor
    sum_dy_xhat: Tensor


def reference(a: Args) -> Out:
    """the sums of `bn_backward_reduce` over dz: each window's gradient at its winner, behind ReLU's mask"""
    return Out(*gradient_sums(unpool(a.dy, a.index, a.x, a.scale, a.shift), a.x, a.mean, a.invstd))


def fake(a: Args) -> Out:
    return Out(vector(a.x, a.x.shape[1]), vector(a.x, a.x.shape[1]))


def refuse(a: Args) -> str | None:
    vectors = {"scale": a.scale, "shift": a.shift, "mean": a.mean, "invstd": a.invstd}
    return bn_act_max_pool.refuse_backward(a.dy, a.index, a.x, **vectors) or refuse_rows(a.rows)


def case(make: Operands, size: Size, rows: int | None = None) -> Args:
    a, (y, index) = bn_act_max_pool.pooled(make, size)
    rows = rows or partial_rows(size[0] * size[2] * size[3], size[1])
    return Args(make.activation(*y.shape), index, *a, *make.moments(size[1]), rows)


def compare(a: Args, actual: Out, plain: Out, truth: Out) -> list[Comparison]:
    exact = comparison.double(a)
    dz = unpool(exact.dy, a.index, exact.x, exact.scale, exact.shift)
    return comparison.gradient_sums(dz, exact.x, exact.mean, exact.invstd, actual, plain)


register(__name__, triton="bn_act_max_pool_backward", cuda=True, cpu=True)
