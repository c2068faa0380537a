"""The backward of a batch norm as an affine map."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops.arithmetic import vector
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.registry import Size, register


class Args(NamedTuple):
    sum_dy: Tensor
    sum_dy_xhat: Tensor
    scale: Tensor
    mean: Tensor
    invstd: Tensor
    count: float  # type: ignore[assignment]


def reference(a: Args) -> Tensor:
    """[3, C]: (a, b, c) such that `bn_backward_apply` is a*dz + b*x + c"""
    factor, mean_dy, mean_dy_xhat = a.scale.double(), a.sum_dy.double() / a.count, a.sum_dy_xhat.double() / a.count
    slope = -factor * mean_dy_xhat * a.invstd.double()
    offset = -factor * mean_dy - slope * a.mean.double()
    return torch.stack([factor, slope, offset]).to(a.scale.dtype)


def fake(a: Args) -> Tensor:
    return vector(a.scale, 3, a.scale.shape[0])


def case(make: Operands, size: Size) -> Args:
    n, c, h, w = size
    sums = (make.vector(c), make.vector(c))
    return Args(*sums, make.vector(c, positive=True), *make.moments(c), float(n * h * w))


register(__name__, kernels=("triton",))
