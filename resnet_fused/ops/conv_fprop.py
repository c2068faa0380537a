"""A convolution with an affine epilogue, residual and activation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.dispatch.conv import ConvShape, conv_refusal, uses_tf32
from resnet_fused.dispatch.table import Problem
from resnet_fused.ops import onednn
from resnet_fused.ops.activations import ACTIVATIONS, activate
from resnet_fused.ops.arithmetic import fold, per_channel, up
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_act, refuse_groups, refuse_like, refuse_operands, refuse_vectors
from resnet_fused.ops.registry import FlopCount, Pair, register


class Args(NamedTuple):
    x: Tensor  # [N, C, H, W], NHWC
    weight: Tensor  # [K, C/groups, R, S], any strides; one that is not NHWC is copied
    scale: Tensor | None  # [K], or None for 1
    shift: Tensor | None  # [K], or None for 0
    residual: Tensor | None  # [N, K, P, Q], NHWC, or None
    stride: Pair  # of the filter, (h, w); so are padding, with zeros, and dilation
    padding: Pair
    dilation: Pair
    groups: int  # run one by one: efficient from 16 channels each on
    act: str | None  # one of `ACTIVATIONS`, or None for the identity


def reference(a: Args) -> Tensor:
    """y = act(scale * conv(x, weight) + shift + residual), fp32 accumulation and epilogue, rounded once; act one of
    `ACTIVATIONS` or None"""
    with torch.autocast(a.x.device.type, enabled=False):
        y = F.conv2d(up(a.x), up(a.weight), None, a.stride, a.padding, a.dilation, a.groups)
    if a.scale is not None:
        y = y * per_channel(a.scale)
    if a.shift is not None:
        y = y + per_channel(a.shift)
    if a.residual is not None:
        y = y + up(a.residual)
    return activate(y, a.act).to(a.x.dtype)


def fake(a: Args) -> Tensor:
    # PyTorch's own rule decides the strides: channels_last if either operand is.
    return F.conv2d(a.x, a.weight, None, a.stride, a.padding, a.dilation, a.groups)


def native(a: Args) -> Tensor:
    """With the scale in the weight: oneDNN's fused convolution on a CPU, else cuDNN's and passes of their own."""
    weight = fold(a.weight, a.scale)
    geometry = (a.stride, a.padding, a.dilation, a.groups)
    if onednn.runs(a.x, weight):
        # ReLU as a pass of its own: oneDNN's turns a NaN into 0, PyTorch's keeps it.
        # Contiguous, because oneDNN's reads a bias without its stride.
        dtype = onednn.bias_dtype(a.x.dtype, a.residual is not None)
        bias = None if a.shift is None else a.shift.to(dtype).contiguous()
        y = onednn.conv(a.x, weight, bias, a.residual, *geometry, act=None)
    else:
        y = F.conv2d(a.x, weight, None if a.shift is None else a.shift.to(weight.dtype), *geometry)
        if a.residual is not None:
            y += a.residual
    return activate(y, a.act, inplace=True)


def conv_shape(a: Args) -> ConvShape:
    return ConvShape.of(a.x.shape, a.weight.shape, a.stride, a.padding, a.dilation, a.groups)


def problems(a: Args) -> tuple[Problem, ...]:
    return (Problem("conv_fprop", conv_shape(a), a.x.dtype, uses_tf32(a.x.dtype)),)


def refuse(a: Args) -> str | None:
    reason = refuse_act(a.act) or refuse_operands(a.x, a.weight) or refuse_groups(a.weight, a.x.shape[1], a.groups)
    if reason is not None:
        return reason
    shape = conv_shape(a)
    return (
        conv_refusal(shape)
        or refuse_like(a.x, shape.output, residual=a.residual)
        or refuse_vectors(a.x.device, shape.k, scale=a.scale, shift=a.shift)
    )


def flops(a: Args, y: Tensor, count: FlopCount) -> int:
    return count(a.x.shape, a.weight.shape, y.shape)


OPTIONS = {"scaled": (False, True), "residual": (False, True), "act": (None, *ACTIVATIONS)}


def case(make: Operands, s: ConvShape, scaled: bool = False, residual: bool = False, act: str | None = "relu") -> Args:
    """Sample arguments.

    Args:
        scaled: the batch norm's scale is given; else it is folded into the weight.
    """
    stride, padding, dilation, groups = s.geometry
    return Args(
        x=make.activation(*s.image),
        weight=make.weight(*s.filter),
        scale=make.vector(s.k, positive=True) if scaled else None,
        shift=make.vector(s.k),
        residual=make.activation(*s.output) if residual else None,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        act=act,
    )


register(__name__, triton="conv_fprop")
