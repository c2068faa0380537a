"""The weight gradient of a convolution, between the batch norms on both of its sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from resnet_fused.dispatch.conv import ConvShape, uses_tf32, wgrad_refusal
from resnet_fused.dispatch.table import Problem
from resnet_fused.ops import bn_apply, comparison
from resnet_fused.ops.arithmetic import activation, bn_gradient, up, vector
from resnet_fused.ops.comparison import Comparison
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_coefficients, refuse_half, refuse_like, refuse_nhwc, refuse_vectors
from resnet_fused.ops.registry import FlopCount, Pair, RunOp, register


class Args(NamedTuple):
    dy: Tensor  # [N, K, P, Q], NHWC
    x: Tensor  # [N, C, H, W], NHWC
    dy_x: Tensor | None  # like dy: what the batch norm behind the convolution normalised; or None
    dy_coefficients: Tensor | None  # [3, K] of `bn_backward_finalize`; with dy_x
    x_scale: Tensor | None  # [C] fp32, or None; so is x_shift, both or neither
    x_shift: Tensor | None
    filter: Pair  # (r, s)
    stride: Pair  # of the filter, (h, w); so are padding, with zeros, and dilation
    padding: Pair
    dilation: Pair
    groups: int


def reference(a: Args) -> Tensor:
    """the gradient of the weight for g = dy, or with dy_x and dy_coefficients = (a, b, c) g = round(a*dy + b*dy_x + c),
    and a as in `conv_fprop_stats`; fp32 (never rounded to the data's dtype), [K, C/groups, R, S] in KRSC memory order.
    The pixels are split and summed in a fixed order: deterministic.
    """
    with torch.autocast(a.x.device.type, enabled=False):
        return _run(a, up)


def _size(a: Args) -> tuple[int, ...]:
    return a.dy.shape[1], a.x.shape[1] // a.groups, *a.filter


def _run(a: Args, cast: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight gradient of operands in the dtype that `cast` gives them."""
    x, gradient = activation(a.x, a.x_scale, a.x_shift), bn_gradient(a.dy, a.dy_x, a.dy_coefficients)
    dweight = conv2d_weight(cast(x), _size(a), cast(gradient), a.stride, a.padding, a.dilation, a.groups)
    return up(dweight).contiguous(memory_format=torch.channels_last)


def fake(a: Args) -> Tensor:
    return vector(a.x, *_size(a)).contiguous(memory_format=torch.channels_last)


def native(a: Args) -> Tensor:
    return _run(a, lambda t: t)


def unfused(a: Args, run: RunOp) -> Callable[[], object]:
    def call() -> object:
        x = bn_apply.normalised(run, a.x, a.x_scale, a.x_shift)
        return native(a._replace(x=x, x_scale=None, x_shift=None))

    return call


def conv_shape(a: Args) -> ConvShape:
    return ConvShape.of(a.x.shape, _size(a), a.stride, a.padding, a.dilation, a.groups)


def problems(a: Args) -> tuple[Problem, ...]:
    flags = ("dy_prologue",) * (a.dy_x is not None) + ("x_prologue",) * (a.x_scale is not None)
    return (Problem("conv_wgrad", conv_shape(a), a.x.dtype, uses_tf32(a.x.dtype), flags),)


def refuse(a: Args) -> str | None:
    reason = (
        refuse_nhwc(a.x)
        or refuse_half(dy_x=a.dy_x, dy_coefficients=a.dy_coefficients)
        or refuse_half(x_scale=a.x_scale, x_shift=a.x_shift)
    )
    if reason is not None:
        return reason
    if a.dy.dim() != 4:
        return f"dy is 4-D [N, K, P, Q], got {a.dy.dim()}-D"
    inputs, outputs, device = a.x.shape[1], a.dy.shape[1], a.x.device
    if a.groups < 1 or inputs % a.groups or outputs % a.groups:
        return f"groups={a.groups} does not divide {inputs} input and {outputs} output channels"
    shape = conv_shape(a)
    return (
        wgrad_refusal(shape)
        or refuse_coefficients(a.dy_coefficients, outputs, device)
        or refuse_like(a.x, shape.output, dy=a.dy, dy_x=a.dy_x)
        or refuse_vectors(device, inputs, x_scale=a.x_scale, x_shift=a.x_shift)
    )


def flops(a: Args, dweight: Tensor, count: FlopCount) -> int:
    return count(*(t.transpose(0, 1).shape for t in (a.x, a.dy, dweight)))


OPTIONS = {"x_prologue": (False, True), "dy_prologue": (False, True)}


def case(make: Operands, s: ConvShape, x_prologue: bool = False, dy_prologue: bool = False) -> Args:
    """Sample arguments.

    Args:
        x_prologue: the input is normalised on the way in.
        dy_prologue: the backward of the batch norm on dy's side is applied on the way in.
    """
    stride, padding, dilation, groups = s.geometry
    return Args(
        dy=make.activation(*s.output),
        x=make.activation(*s.image),
        dy_x=make.activation(*s.output) if dy_prologue else None,
        dy_coefficients=make.coefficients(s.k) if dy_prologue else None,
        x_scale=make.vector(s.c, positive=True) if x_prologue else None,
        x_shift=make.vector(s.c) if x_prologue else None,
        filter=(s.r, s.s),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


def compare(a: Args, actual: Tensor, plain: Tensor, truth: Tensor) -> list[Comparison]:
    terms = reference(comparison.map_tensors(a, lambda t: t.double().abs()))
    return [Comparison("dweight", actual, plain, truth, terms)]


register(__name__, triton="conv_wgrad")
