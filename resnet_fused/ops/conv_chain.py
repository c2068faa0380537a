"""The tail of a bottleneck and the head of the one after it, for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.dispatch.conv_chain import chain_flags, chain_refusal
from resnet_fused.dispatch.table import Problem
from resnet_fused.ops import conv_fprop
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_like, refuse_operands, refuse_vectors
from resnet_fused.ops.registry import FlopCount, Pair, register


class Args(NamedTuple):
    x: Tensor  # [N, C, H, W], NHWC; fp16 or bf16
    weight2: Tensor  # [C2, C, R, S]; C2 at most 128
    scale2: Tensor | None  # [C2], or None for 1
    shift2: Tensor  # [C2]
    weight3: Tensor  # [K, C2, 1, 1]
    scale3: Tensor | None  # [K], or None for 1
    shift3: Tensor  # [K]
    residual: Tensor  # [N, K, P, Q], NHWC
    weight1: Tensor | None  # [C1, K, 1, 1], C1 at most 128; or None: no next convolution
    scale1: Tensor | None  # [C1], or None for 1
    shift1: Tensor | None  # [C1]; with weight1
    stride: Pair  # of weight2, (h, w); so are padding, with zeros, and dilation
    padding: Pair
    dilation: Pair


class Out(NamedTuple):
    y: Tensor
    next: Tensor


def reference(a: Args) -> Out:
    """a = round(relu(conv(x, weight2)*scale2 + shift2)), stride, padding and dilation are of this one;
    y = round(relu(conv1x1(a, weight3)*scale3 + shift3 + residual));
    next = round(relu(conv1x1(y, weight1)*scale1 + shift1)), or an empty tensor without weight1.
    """
    return sequence(a, conv_fprop.reference)


def sequence(a: Args, fprop: Callable[[conv_fprop.Args], Tensor]) -> Out:
    """The convolutions one by one, each by `fprop`."""
    one, zero = (1, 1), (0, 0)
    geometry, pointwise = (a.stride, a.padding, a.dilation, 1), (one, zero, one, 1)
    inner = fprop(conv_fprop.Args(a.x, a.weight2, a.scale2, a.shift2, None, *geometry, act="relu"))
    y = fprop(conv_fprop.Args(inner, a.weight3, a.scale3, a.shift3, a.residual, *pointwise, act="relu"))
    if a.weight1 is None:
        return Out(y, a.x.new_empty(0))
    return Out(y, fprop(conv_fprop.Args(y, a.weight1, a.scale1, a.shift1, None, *pointwise, act="relu")))


def fake(a: Args) -> Out:
    y = F.conv2d(F.conv2d(a.x, a.weight2, None, a.stride, a.padding, a.dilation), a.weight3)
    return Out(y, a.x.new_empty(0) if a.weight1 is None else F.conv2d(y, a.weight1))


def native(a: Args) -> Out:
    return sequence(a, conv_fprop.native)


def conv_shape(a: Args) -> ConvShape:
    """Of the first convolution."""
    return ConvShape.of(a.x.shape, a.weight2.shape, a.stride, a.padding, a.dilation)


def problems(a: Args) -> tuple[Problem, ...]:
    flags = chain_flags(a.weight3.shape[0], None if a.weight1 is None else a.weight1.shape[0])
    return (Problem("conv_chain", conv_shape(a), a.x.dtype, flags=flags),)


def refuse(a: Args) -> str | None:
    reason = refuse_operands(a.x, a.weight2) or refuse_operands(a.x, a.weight3)
    if reason is not None:
        return reason
    inner, outputs, device = a.weight2.shape[0], a.weight3.shape[0], a.x.device
    following = None if a.weight1 is None else a.weight1.shape[0]
    if a.weight2.shape[1] != a.x.shape[1]:
        return f"weight2 {tuple(a.weight2.shape)} does not fit {a.x.shape[1]} input channels"
    reason = _refuse_pointwise("weight3", a.weight3, inner)
    if a.weight1 is not None:
        reason = reason or refuse_operands(a.x, a.weight1) or _refuse_pointwise("weight1", a.weight1, outputs)
        reason = reason or ("weight1 comes with shift1" if a.shift1 is None else None)
    elif a.scale1 is not None or a.shift1 is not None:
        reason = reason or "scale1 and shift1 come with weight1"
    shape = conv_shape(a)
    return (
        reason
        or refuse_vectors(device, following or 0, scale1=a.scale1, shift1=a.shift1)
        or chain_refusal(shape, outputs, following, a.x.dtype)
        or refuse_like(a.x, (shape.n, outputs, shape.p, shape.q), residual=a.residual)
        or refuse_vectors(device, inner, scale2=a.scale2, shift2=a.shift2)
        or refuse_vectors(device, outputs, scale3=a.scale3, shift3=a.shift3)
    )


def _refuse_pointwise(name: str, weight: Tensor, inputs: int) -> str | None:
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (inputs, 1, 1):
        return f"{name} must be [outputs, {inputs}, 1, 1], got {tuple(weight.shape)}"
    return None


def flops(a: Args, out: Out, count: FlopCount) -> int:
    inner = torch.Size((a.x.shape[0], a.weight2.shape[0], *out.y.shape[2:]))
    found = count(a.x.shape, a.weight2.shape, inner) + count(inner, a.weight3.shape, out.y.shape)
    return found if a.weight1 is None else found + count(out.y.shape, a.weight1.shape, out.next.shape)


def case(make: Operands, s: ConvShape, outputs: int = 0, following: int = 0) -> Args:
    """Sample arguments.

    Args:
        outputs: channels of the block's result; 0 for four times those of its 3x3.
        following: channels of the next block's first convolution; 0 for none.
    """
    outputs = outputs or 4 * s.k
    return Args(
        x=make.activation(*s.image),
        weight2=make.weight(*s.filter),
        scale2=None,
        shift2=make.vector(s.k),
        weight3=make.weight(outputs, s.k, 1, 1),
        scale3=None,
        shift3=make.vector(outputs),
        residual=make.activation(s.n, outputs, s.p, s.q),
        weight1=make.weight(following, outputs, 1, 1) if following else None,
        scale1=None,
        shift1=make.vector(following) if following else None,
        stride=s.stride,
        padding=s.padding,
        dilation=s.dilation,
    )


register(__name__, triton="conv_chain")
