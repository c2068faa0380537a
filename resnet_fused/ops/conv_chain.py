"""The tail of a bottleneck and the head of the one after it, for inference."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.ops import conv_fprop
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.registry import Pair, register


class Args(NamedTuple):
    x: Tensor
    weight2: Tensor
    scale2: Tensor | None
    shift2: Tensor
    weight3: Tensor
    scale3: Tensor | None
    shift3: Tensor
    residual: Tensor
    weight1: Tensor | None
    scale1: Tensor | None
    shift1: Tensor | None
    stride: Pair
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
    one, zero = (1, 1), (0, 0)

    def fprop(*operands: Tensor | None, geometry: tuple[Pair, ...] = (one, zero, one)) -> Tensor:
        return conv_fprop.reference(conv_fprop.Args(*operands, *geometry, 1, True))  # type: ignore[arg-type, call-arg]

    inner = fprop(a.x, a.weight2, a.scale2, a.shift2, None, geometry=(a.stride, a.padding, a.dilation))
    y = fprop(inner, a.weight3, a.scale3, a.shift3, a.residual)
    if a.weight1 is None:
        return Out(y, a.x.new_empty(0))
    return Out(y, fprop(y, a.weight1, a.scale1, a.shift1, None))


def fake(a: Args) -> Out:
    y = F.conv2d(F.conv2d(a.x, a.weight2, None, a.stride, a.padding, a.dilation), a.weight3)
    return Out(y, a.x.new_empty(0) if a.weight1 is None else F.conv2d(y, a.weight1))


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


register(__name__, kernels=("triton",))
