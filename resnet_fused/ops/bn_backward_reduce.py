"""The two sums over a batch that the backward of a batch norm needs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from resnet_fused.ops.arithmetic import gradient_sums, masked_gradient, vector
from resnet_fused.ops.registry import register


class Args(NamedTuple):
    dy: Tensor
    x: Tensor
    mask: Tensor | None
    scale: Tensor
    shift: Tensor
    mean: Tensor
    invstd: Tensor
    relu: bool
    rows: int


class Out(NamedTuple):
    sum_dy: Tensor
    sum_dy_xhat: Tensor


def reference(a: Args) -> Out:
    """over dz = mask ? dy : 0 (a true select: NaN in dy is dropped where the mask is zero): sum(dz),
    sum(dz * (x - mean) * invstd), [C] each. relu without mask: the mask is recomputed as
    not (round(x*scale + shift) <= 0) with the arithmetic of `bn_apply` (one fma). `rows` is the number of partial sums
    per channel, reduced in a fixed order.
    """
    dz = masked_gradient(a.dy, a.x, a.mask, a.scale, a.shift, a.relu)
    return Out(*gradient_sums(dz, a.x, a.mean, a.invstd))


def fake(a: Args) -> Out:
    return Out(vector(a.x, a.x.shape[1]), vector(a.x, a.x.shape[1]))


register(__name__, kernels=("triton", "cuda"))
