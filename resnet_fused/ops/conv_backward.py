"""Both gradients of a convolution between two batch norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.dispatch.table import Problem
from resnet_fused.ops import conv_dgrad, conv_wgrad
from resnet_fused.ops.comparison import Comparison
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.registry import FlopCount, Pair, register


class Args(NamedTuple):
    dy: Tensor  # this and what follows as in `conv_dgrad`
    weight: Tensor
    dy_x: Tensor | None
    dy_coefficients: Tensor | None
    x: Tensor
    scale: Tensor
    shift: Tensor
    mean: Tensor
    invstd: Tensor
    x_prologue: bool  # the weight gradient normalises x; else the data gradient writes the activation for it
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


class Out(NamedTuple):
    dx: Tensor
    sum_dx: Tensor
    sum_dx_xhat: Tensor
    dweight: Tensor


def reference(a: Args) -> Out:
    """dx, sum_dx and sum_dx_xhat of `conv_dgrad` with x, scale, shift, mean and invstd; dweight of `conv_wgrad` with
    x_scale = scale and x_shift = shift. x_prologue says how, not what: whether the weight gradient normalises x on its
    way in, or the data gradient, which reads x too, writes the activation for it.
    """
    return _run(a, conv_dgrad.reference, conv_wgrad.reference)


def dgrad_args(a: Args) -> conv_dgrad.Args:
    shared = {name: value for name, value in a._asdict().items() if name in conv_dgrad.Args._fields}
    return conv_dgrad.Args(**shared, residual=None, residual_mask=None, size=a.x.shape[2:])


def wgrad_args(a: Args, activation: Tensor | None = None) -> conv_wgrad.Args:
    """Of the activation, or of x where there is none."""
    shared = {name: value for name, value in a._asdict().items() if name in conv_wgrad.Args._fields}
    given = conv_wgrad.Args(**shared, x_scale=a.scale, x_shift=a.shift, filter=a.weight.shape[2:])
    return given if activation is None else given._replace(x=activation, x_scale=None, x_shift=None)


def _run(
    a: Args, dgrad: Callable[[conv_dgrad.Args], conv_dgrad.Out], wgrad: Callable[[conv_wgrad.Args], Tensor]
) -> Out:
    return Out(*dgrad(dgrad_args(a)), wgrad(wgrad_args(a)))


def fake(a: Args) -> Out:
    return _run(a, conv_dgrad.fake, conv_wgrad.fake)


def native(a: Args) -> Out:
    return _run(a, conv_dgrad.native, conv_wgrad.native)


def problems(a: Args) -> tuple[Problem, ...]:
    wgrad = wgrad_args(a, None if a.x_prologue else a.x)
    return *conv_dgrad.problems(dgrad_args(a)), *conv_wgrad.problems(wgrad)


def refuse(a: Args) -> str | None:
    return conv_dgrad.refuse(dgrad_args(a)) or conv_wgrad.refuse(wgrad_args(a))


def flops(a: Args, out: Out, count: FlopCount) -> int:
    dgrad = conv_dgrad.flops(dgrad_args(a), conv_dgrad.Out(*out[:3]), count)
    return dgrad + conv_wgrad.flops(wgrad_args(a), out.dweight, count)


OPTIONS = {"prologue": (False, True), "x_prologue": (True, False)}


def case(make: Operands, s: ConvShape, prologue: bool = False, x_prologue: bool = False) -> Args:
    """Sample arguments.

    Args:
        prologue: the backward of the batch norm on dy's side is applied on the way in.
        x_prologue: the weight gradient normalises x.
    """
    given: dict[str, Any] = conv_dgrad.case(make, s, prologue, "batch norm")._asdict()
    return Args(**{name: given[name] for name in Args._fields if name in given}, x_prologue=x_prologue)


def runs_beside(op: str, options: Mapping[str, Any]) -> bool:
    """A data gradient behind a batch norm runs together with the weight gradient."""
    return op == "conv_dgrad" and options["epilogue"] == "batch norm"


def compare(a: Args, actual: Out, plain: Out, truth: Out) -> list[Comparison]:
    dgrad = (conv_dgrad.Out(*out[:3]) for out in (actual, plain, truth))
    wgrad = (out.dweight for out in (actual, plain, truth))
    return [*conv_dgrad.compare(dgrad_args(a), *dgrad), *conv_wgrad.compare(wgrad_args(a), *wgrad)]


register(__name__, triton="conv_backward")
