"""The data gradient of a convolution, with the backward of the batch norms on both of its sides."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from resnet_fused.dispatch.conv import ConvShape, dgrad_refusal, uses_tf32
from resnet_fused.dispatch.heuristics import partial_rows
from resnet_fused.dispatch.table import Problem
from resnet_fused.ops import comparison
from resnet_fused.ops.arithmetic import (
    bn_gradient,
    gradient_sums,
    memory_format,
    passes_relu,
    rounded,
    select,
    unpack_bits,
    up,
    vector,
)
from resnet_fused.ops.comparison import Comparison
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import (
    refuse_bits,
    refuse_coefficients,
    refuse_groups,
    refuse_half,
    refuse_like,
    refuse_operands,
    refuse_vectors,
)
from resnet_fused.ops.registry import FlopCount, Pair, RunOp, register


class Args(NamedTuple):
    dy: Tensor  # [N, K, P, Q], NHWC
    weight: Tensor  # [K, C/groups, R, S], any strides; one that is not NHWC is copied
    dy_x: Tensor | None  # like dy: what the batch norm behind the convolution normalised; or None
    dy_coefficients: Tensor | None  # [3, K] of `bn_backward_finalize`; with dy_x
    residual: Tensor | None  # [N, C, *size], NHWC, or None
    residual_mask: Tensor | None  # bits of `bn_apply`, or None: all of it
    x: Tensor | None  # [N, C, *size], NHWC: what the batch norm in front normalised; or None
    scale: Tensor | None  # [C] fp32; so are all vectors, with x
    shift: Tensor | None
    mean: Tensor | None
    invstd: Tensor | None
    size: Pair  # (H, W) of the image
    stride: Pair  # of the filter, (h, w); so are padding, with zeros, and dilation
    padding: Pair
    dilation: Pair
    groups: int


class Out(NamedTuple):
    dx: Tensor
    sum_dx: Tensor
    sum_dx_xhat: Tensor


def reference(a: Args) -> Out:
    """g = dy, or with dy_x and dy_coefficients = (a, b, c), [3, K], the batch norm's gradient
    g = round(a*dy + b*dy_x + c), zero outside the image. dx = the gradient of conv(., weight) for g, [N, C, *size],
    plus residual: all of it, or where residual_mask (bits as in `bn_apply`) has a 1. With x, scale, shift, mean,
    invstd - the batch norm and ReLU that made the convolution's input a = relu(x*scale + shift) - dx passes only where
    not (round(x*scale + shift) <= 0) (a select), and sum_dx = sum(dx), sum_dx_xhat = sum(dx * (x - mean) * invstd),
    [C] each, of dx as it was rounded. Without them the sums are empty tensors. residual and x exclude each other.
    """
    with torch.autocast(a.dy.device.type, enabled=False):
        return _run(a, up)


def _image(a: Args) -> tuple[int, ...]:
    return a.dy.shape[0], a.weight.shape[1] * a.groups, *a.size


def _run(a: Args, cast: Callable[[Tensor], Tensor]) -> Out:
    """The data gradient of operands in the dtype that `cast` gives them."""
    gradient, weight = cast(bn_gradient(a.dy, a.dy_x, a.dy_coefficients)), cast(a.weight)
    dx = conv2d_input(_image(a), weight, gradient, a.stride, a.padding, a.dilation, a.groups)
    if a.residual is not None:
        addend = cast(a.residual)
        dx += addend if a.residual_mask is None else select(unpack_bits(a.residual_mask, a.residual), addend)
    if a.x is None or a.scale is None or a.shift is None or a.mean is None or a.invstd is None:
        return Out(rounded(dx, a.dy), vector(a.dy, 0), vector(a.dy, 0))
    dx = rounded(select(passes_relu(a.x, a.scale, a.shift), dx), a.dy)
    return Out(dx, *gradient_sums(up(dx), a.x, a.mean, a.invstd))


def fake(a: Args) -> Out:
    order = memory_format(a.dy)
    dx = torch.empty(_image(a), dtype=a.dy.dtype, device=a.dy.device, memory_format=order)
    sums = 0 if a.x is None else dx.shape[1]
    return Out(dx, vector(a.dy, sums), vector(a.dy, sums))


def native(a: Args) -> Out:
    return _run(a, lambda t: t)


def unfused(a: Args, run: RunOp) -> Callable[[], object]:
    if a.residual is not None and a.residual_mask is not None:  # a convolution that knows no bits is handed it masked
        masked = torch.where(unpack_bits(a.residual_mask, a.residual), a.residual, 0)
        a = a._replace(residual=masked, residual_mask=None)

    def call() -> object:
        if a.residual is not None:  # which the pass before then writes, beside the gradient
            torch.zeros_like(a.residual)
        dx = native(a._replace(x=None, scale=None, shift=None, mean=None, invstd=None)).dx
        if a.x is None:
            return dx
        vectors = {"scale": a.scale, "shift": a.shift, "mean": a.mean, "invstd": a.invstd}
        n, c, h, w = a.x.shape
        rows = partial_rows(n * h * w, c)
        return dx, run("bn_backward_reduce", dy=dx, x=a.x, mask=None, **vectors, relu=True, rows=rows)

    return call


def conv_shape(a: Args) -> ConvShape:
    return ConvShape.of(_image(a), a.weight.shape, a.stride, a.padding, a.dilation, a.groups)


def problems(a: Args) -> tuple[Problem, ...]:
    flags = () if a.dy_x is None else ("prologue",)
    return (Problem("conv_dgrad", conv_shape(a), a.dy.dtype, uses_tf32(a.dy.dtype), flags),)


def refuse(a: Args) -> str | None:
    image = _image(a)
    reason = refuse_operands(a.dy, a.weight) or refuse_groups(a.weight, image[1], a.groups)
    if reason is not None:
        return reason
    shape = conv_shape(a)
    reason = dgrad_refusal(shape)
    if reason is not None:
        return reason
    if tuple(a.dy.shape) != shape.output:
        return f"a convolution of an image {tuple(a.size)} gives {shape.output}, dy is {tuple(a.dy.shape)}"
    if a.residual is not None and a.x is not None:
        return "residual and x exclude each other, got both"
    if a.residual is None and a.residual_mask is not None:
        return "residual_mask comes with a residual, got none"
    vectors = {"scale": a.scale, "shift": a.shift, "mean": a.mean, "invstd": a.invstd}
    return (
        refuse_half(dy_x=a.dy_x, dy_coefficients=a.dy_coefficients)
        or refuse_like(a.dy, shape.output, dy_x=a.dy_x)
        or refuse_coefficients(a.dy_coefficients, shape.k, a.dy.device)
        or refuse_half(x=a.x, **vectors)
        or refuse_like(a.dy, image, residual=a.residual, x=a.x)
        or refuse_bits(math.prod(image), a.dy.device, residual_mask=a.residual_mask)
        or refuse_vectors(a.dy.device, shape.c, None, **vectors)
    )


def flops(a: Args, out: Out, count: FlopCount) -> int:
    return count(a.dy.shape, a.weight.shape, out.dx.shape, transposed=True)


OPTIONS = {"prologue": (False, True), "epilogue": ("", "residual", "masked residual", "batch norm")}


def case(make: Operands, s: ConvShape, prologue: bool = False, epilogue: str = "") -> Args:
    """Sample arguments.

    Args:
        prologue: the backward of the batch norm on dy's side is applied on the way in.
        epilogue: `""`; `"residual"`, or `"masked residual"` for one with bits; `"batch norm"` for ReLU's mask and the
            sums.
    """
    stride, padding, dilation, groups = s.geometry
    norm = epilogue == "batch norm"
    return Args(
        dy=make.activation(*s.output),
        weight=make.weight(*s.filter),
        dy_x=make.activation(*s.output) if prologue else None,
        dy_coefficients=make.coefficients(s.k) if prologue else None,
        residual=make.activation(*s.image) if "residual" in epilogue else None,
        residual_mask=make.bits(math.prod(s.image)) if "masked" in epilogue else None,
        x=make.activation(*s.image) if norm else None,
        scale=make.vector(s.c, positive=True) if norm else None,
        shift=make.vector(s.c) if norm else None,
        mean=make.vector(s.c) if norm else None,
        invstd=make.vector(s.c, positive=True) if norm else None,
        size=(s.h, s.w),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


def compare(a: Args, actual: Out, plain: Out, truth: Out) -> list[Comparison]:
    found = [Comparison("dx", actual.dx, plain.dx, truth.dx)]
    if a.x is not None and a.mean is not None and a.invstd is not None:
        x, mean, invstd = a.x.double(), a.mean.double(), a.invstd.double()
        found += comparison.gradient_sums(actual.dx.double(), x, mean, invstd, actual[1:])
    return found


register(__name__, triton="conv_dgrad")
