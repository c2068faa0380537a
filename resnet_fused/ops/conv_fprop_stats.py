"""A convolution that forms the statistics of what it writes and normalises what it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.dispatch.conv import ConvShape, uses_tf32
from resnet_fused.dispatch.heuristics import partial_rows
from resnet_fused.dispatch.table import Problem
from resnet_fused.ops import bn_apply, bn_stats, comparison, conv_fprop
from resnet_fused.ops.arithmetic import activation, up
from resnet_fused.ops.comparison import Comparison
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_half, refuse_rows, refuse_vectors
from resnet_fused.ops.registry import FlopCount, Pair, RunOp, register


class Args(NamedTuple):
    x: Tensor  # [N, C, H, W], NHWC
    weight: Tensor  # as in `conv_fprop`; so are stride, padding, dilation and groups
    x_scale: Tensor | None  # [C] fp32, or None; so is x_shift, both or neither
    x_shift: Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    rows: int  # how many rows of statistics to return


class Out(NamedTuple):
    y: Tensor
    mean: Tensor
    m2: Tensor
    count: Tensor  # type: ignore[assignment]


def reference(a: Args) -> Out:
    """y = round(conv(a, weight)), and the statistics of y as it was rounded. a = x, or with x_scale and x_shift (both
    or neither) the activation a = round(relu(x*x_scale + x_shift)) that `bn_apply` would write: the padding is zero
    *after* that map. The rows are as in `bn_stats`, over some partition of the pixels into at most `rows` parts; rows
    left over have mean = m2 = count = 0.
    """
    with torch.autocast(a.x.device.type, enabled=False):
        return _run(a, up)


def _run(a: Args, cast: Callable[[Tensor], Tensor]) -> Out:
    """The convolution of operands in the dtype that `cast` gives them."""
    x, weight = cast(activation(a.x, a.x_scale, a.x_shift)), cast(a.weight)
    y = F.conv2d(x, weight, None, a.stride, a.padding, a.dilation, a.groups).to(a.x.dtype)
    return Out(y, *bn_stats.reference(bn_stats.Args(y, a.rows)))


def fake(a: Args) -> Out:
    y = F.conv2d(a.x, a.weight, None, a.stride, a.padding, a.dilation, a.groups)
    return Out(y, *bn_stats.fake(bn_stats.Args(y, a.rows)))


def native(a: Args) -> Out:
    return _run(a, lambda t: t)


def unfused(a: Args, run: RunOp) -> Callable[[], object]:
    def call() -> object:
        x = bn_apply.normalised(run, a.x, a.x_scale, a.x_shift)
        y = F.conv2d(x, a.weight, None, a.stride, a.padding, a.dilation, a.groups)
        return y, run("bn_stats", x=y, rows=a.rows)

    return call


def _plain(a: Args) -> conv_fprop.Args:
    """The convolution alone."""
    return conv_fprop.Args(a.x, a.weight, None, None, None, a.stride, a.padding, a.dilation, a.groups, act=None)


def conv_shape(a: Args) -> ConvShape:
    return conv_fprop.conv_shape(_plain(a))


def problems(a: Args) -> tuple[Problem, ...]:
    flags = () if a.x_scale is None else ("prologue",)
    return (Problem("conv_fprop_stats", conv_shape(a), a.x.dtype, uses_tf32(a.x.dtype), flags),)


def refuse(a: Args) -> str | None:
    prologue = {"x_scale": a.x_scale, "x_shift": a.x_shift}
    return (
        conv_fprop.refuse(_plain(a))
        or refuse_rows(a.rows)
        or refuse_half(**prologue)
        or refuse_vectors(a.x.device, a.x.shape[1], None, **prologue)
    )


def flops(a: Args, out: Out, count: FlopCount) -> int:
    return count(a.x.shape, a.weight.shape, out.y.shape)


OPTIONS = {"prologue": (False, True)}


def case(make: Operands, s: ConvShape, prologue: bool = False, rows: int | None = None) -> Args:
    """Sample arguments.

    Args:
        prologue: the input is normalised on the way in.
    """
    stride, padding, dilation, groups = s.geometry
    return Args(
        x=make.activation(*s.image),
        weight=make.weight(*s.filter),
        x_scale=make.vector(s.c, positive=True) if prologue else None,
        x_shift=make.vector(s.c) if prologue else None,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        rows=rows or partial_rows(s.n * s.p * s.q, s.k),
    )


def compare(a: Args, actual: Out, plain: Out, truth: Out) -> list[Comparison]:
    return [Comparison("y", actual.y, plain.y, truth.y), *comparison.statistics(actual.y, actual[1:])]


register(__name__, triton="conv_fprop")
