"""The backward of a batch norm as an affine map."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops.arithmetic import vector
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import name_of
from resnet_fused.ops.registry import Size, register


class Args(NamedTuple):
    sum_dy: Tensor  # [C] fp32; so are all vectors
    sum_dy_xhat: Tensor
    scale: Tensor
    mean: Tensor
    invstd: Tensor
    count: float  # type: ignore[assignment]  # pixels that the sums run over


def reference(a: Args) -> Tensor:
    """[3, C]: (a, b, c) such that `bn_backward_apply` is a*dz + b*x + c"""
    factor, mean_dy, mean_dy_xhat = a.scale.double(), a.sum_dy.double() / a.count, a.sum_dy_xhat.double() / a.count
    slope = -factor * mean_dy_xhat * a.invstd.double()
    offset = -factor * mean_dy - slope * a.mean.double()
    return torch.stack([factor, slope, offset]).to(a.scale.dtype)


def fake(a: Args) -> Tensor:
    return vector(a.scale, 3, a.scale.shape[0])


native = reference


def refuse(a: Args) -> str | None:
    vectors = {"sum_dy": a.sum_dy, "sum_dy_xhat": a.sum_dy_xhat, "scale": a.scale, "mean": a.mean, "invstd": a.invstd}
    for name, given in vectors.items():
        if given.dtype != torch.float32 or given.shape != a.sum_dy.shape or given.dim() != 1:
            wanted = f"a float32 vector, of one length with the others ({tuple(a.sum_dy.shape)})"
            return f"{name} must be {wanted}, got {name_of(given.dtype)} {tuple(given.shape)}"
        if not given.is_contiguous():
            return f"{name} must be contiguous, got strides {tuple(given.stride())}"
        if given.device != a.sum_dy.device:
            return f"{name} is on {given.device}, sum_dy on {a.sum_dy.device}"
    return None


def case(make: Operands, size: Size) -> Args:
    n, c, h, w = size
    sums = (make.vector(c), make.vector(c))
    return Args(*sums, make.vector(c, positive=True), *make.moments(c), float(n * h * w))


register(__name__, triton="bn_backward_finalize")
