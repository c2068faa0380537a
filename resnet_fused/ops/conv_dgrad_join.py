"""Both gradients of a block's first convolution, with the sums of the batch norms that end the block before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.dispatch.table import Problem
from resnet_fused.ops import comparison, conv_dgrad, conv_wgrad
from resnet_fused.ops.arithmetic import gradient_sums, select, unpack_bits, up, vector
from resnet_fused.ops.comparison import Comparison
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_bits, refuse_half, refuse_like, refuse_vectors
from resnet_fused.ops.registry import FlopCount, Pair, register


class Args(NamedTuple):
    dy: Tensor  # this and what follows as in `conv_dgrad`
    weight: Tensor
    dy_x: Tensor | None
    dy_coefficients: Tensor | None
    residual: Tensor | None
    residual_mask: Tensor | None
    x: Tensor  # [N, C, *size], NHWC: what the batch norm normalised whose sum with a shortcut, rectified, was the input
    mask: Tensor  # bits of that ReLU, of `bn_apply`
    mean: Tensor  # [C] fp32; so are all vectors
    invstd: Tensor
    shortcut: Tensor | None  # like x: what a projection's batch norm normalised; or None
    shortcut_mean: Tensor | None
    shortcut_invstd: Tensor | None
    activation: Tensor | None  # like x: the convolution's input; or None
    size: Pair  # this and what follows as in `conv_dgrad`
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


class Out(NamedTuple):
    dx: Tensor
    sum_dz: Tensor
    sum_dz_xhat: Tensor
    sum_dz_shortcut: Tensor
    dweight: Tensor


def reference(a: Args) -> Out:
    """dx of `conv_dgrad`, unmasked, and over dz = mask ? dx : 0 (a select, of dx as it was rounded) the sums
    `bn_backward_reduce` would find for x and, behind the same mask, for the projection `shortcut`; without it the last
    is empty. dweight: with the convolution's input, the activation, as `conv_wgrad` gives it; else empty.
    """
    return _run(a, conv_dgrad.reference, conv_wgrad.reference)


def dgrad_args(a: Args) -> conv_dgrad.Args:
    """The arguments of the gradient itself, which is that of a convolution without a batch norm in front."""
    shared = {name: value for name, value in a._asdict().items() if name in conv_dgrad.Args._fields}
    return conv_dgrad.Args(**shared | dict.fromkeys(("x", "scale", "shift", "mean", "invstd")))


def wgrad_args(a: Args) -> conv_wgrad.Args | None:
    if a.activation is None:
        return None
    shared = {name: value for name, value in a._asdict().items() if name in conv_wgrad.Args._fields}
    return conv_wgrad.Args(**shared | {"x": a.activation}, x_scale=None, x_shift=None, filter=a.weight.shape[2:])


def _run(
    a: Args, dgrad: Callable[[conv_dgrad.Args], conv_dgrad.Out], wgrad: Callable[[conv_wgrad.Args], Tensor]
) -> Out:
    dx, given = dgrad(dgrad_args(a)).dx, wgrad_args(a)
    dweight = vector(a.dy, 0) if given is None else wgrad(given)
    dz = select(unpack_bits(a.mask, a.x), up(dx))
    sums = gradient_sums(dz, a.x, a.mean, a.invstd)
    if a.shortcut is None or a.shortcut_mean is None or a.shortcut_invstd is None:
        return Out(dx, *sums, dz.new_empty(0), dweight)
    return Out(dx, *sums, gradient_sums(dz, a.shortcut, a.shortcut_mean, a.shortcut_invstd)[1], dweight)


def fake(a: Args) -> Out:
    dx, given = conv_dgrad.fake(dgrad_args(a)).dx, wgrad_args(a)
    dweight = vector(a.dy, 0) if given is None else conv_wgrad.fake(given)
    channels = dx.shape[1]
    shortcut = 0 if a.shortcut is None else channels
    return Out(dx, vector(a.dy, channels), vector(a.dy, channels), vector(a.dy, shortcut), dweight)


def native(a: Args) -> Out:
    return _run(a, conv_dgrad.native, conv_wgrad.native)


def problems(a: Args) -> tuple[Problem, ...]:
    given = wgrad_args(a)
    return *conv_dgrad.problems(dgrad_args(a)), *(() if given is None else conv_wgrad.problems(given))


def refuse(a: Args) -> str | None:
    reason = conv_dgrad.refuse(dgrad_args(a))
    if reason is not None:
        return reason
    image = (a.dy.shape[0], a.weight.shape[1] * a.groups, *a.size)
    shortcut = {"shortcut_mean": a.shortcut_mean, "shortcut_invstd": a.shortcut_invstd}
    return (
        refuse_half(shortcut=a.shortcut, **shortcut)
        or refuse_like(a.dy, image, x=a.x, shortcut=a.shortcut, activation=a.activation)
        or refuse_vectors(a.dy.device, image[1], None, mean=a.mean, invstd=a.invstd, **shortcut)
        or refuse_bits(math.prod(image), a.dy.device, mask=a.mask)
        or ((given := wgrad_args(a)) and conv_wgrad.refuse(given))
    )


def flops(a: Args, out: Out, count: FlopCount) -> int:
    given = wgrad_args(a)
    dgrad = count(a.dy.shape, a.weight.shape, out.dx.shape, transposed=True)
    return dgrad if given is None else dgrad + conv_wgrad.flops(given, out.dweight, count)


OPTIONS = {
    "prologue": (False, True),
    "epilogue": ("", "masked residual"),
    "projection": (False, True),
    "wgrad": (False, True),
}


def case(
    make: Operands,
    s: ConvShape,
    prologue: bool = False,
    epilogue: str = "",
    projection: bool = True,
    wgrad: bool = False,
) -> Args:
    """Sample arguments.

    Args:
        prologue, epilogue: as in `conv_dgrad`, without `"batch norm"`.
        projection: the block before ends in the sum of two batch norms.
        wgrad: the gradient of the weight is formed beside it.
    """
    a = conv_dgrad.case(make, s, prologue, epilogue)
    return Args(
        dy=a.dy,
        weight=a.weight,
        dy_x=a.dy_x,
        dy_coefficients=a.dy_coefficients,
        residual=a.residual,
        residual_mask=a.residual_mask,
        x=make.activation(*s.image),
        mask=make.bits(math.prod(s.image)),
        mean=make.vector(s.c),
        invstd=make.vector(s.c, positive=True),
        shortcut=make.activation(*s.image) if projection else None,
        shortcut_mean=make.vector(s.c) if projection else None,
        shortcut_invstd=make.vector(s.c, positive=True) if projection else None,
        activation=make.activation(*s.image) if wgrad else None,
        size=a.size,
        stride=a.stride,
        padding=a.padding,
        dilation=a.dilation,
        groups=a.groups,
    )


def compare(a: Args, actual: Out, plain: Out, truth: Out) -> list[Comparison]:
    exact = comparison.double(a)
    dz = torch.where(unpack_bits(a.mask, a.x), actual.dx.double(), 0)
    found = [Comparison("dx", actual.dx, plain.dx, truth.dx)]
    found += comparison.gradient_sums(dz, exact.x, exact.mean, exact.invstd, actual[1:3])
    if exact.shortcut is not None and exact.shortcut_mean is not None and exact.shortcut_invstd is not None:
        norm = (exact.shortcut, exact.shortcut_mean, exact.shortcut_invstd)
        found += comparison.gradient_sums(dz, *norm, (actual.sum_dz, actual.sum_dz_shortcut))[1:]
    given = wgrad_args(exact)
    if given is not None:
        found += conv_wgrad.compare(given, actual.dweight, plain.dweight, truth.dweight)
    return found


def runs_beside(op: str, options: Mapping[str, Any]) -> bool:
    """A block's first data gradient forms the sums of the block before it."""
    return op == "conv_dgrad" and options["epilogue"] != "batch norm"


register(__name__, triton="conv_dgrad_join")
