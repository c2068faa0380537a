"""The two sums over a batch that the backward of a batch norm needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.dispatch.heuristics import partial_rows
from resnet_fused.ops import comparison
from resnet_fused.ops.arithmetic import behind_relu, gradient_sums, vector
from resnet_fused.ops.comparison import Comparison
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_activations, refuse_bits, refuse_rows, refuse_vectors
from resnet_fused.ops.registry import Size, register


class Args(NamedTuple):
    dy: Tensor  # like x
    x: Tensor  # [N, C, H, W], what the batch norm normalised
    mask: Tensor | None  # bits of `bn_apply`, or None: recomputed from x
    scale: Tensor  # [C] fp32; so are all vectors
    shift: Tensor
    mean: Tensor
    invstd: Tensor
    relu: bool  # without it dz = dy
    rows: int  # partial sums of each channel


class Out(NamedTuple):
    sum_dy: Tensor
    sum_dy_xhat: Tensor


def reference(a: Args) -> Out:
    """over dz = mask ? dy : 0 (a true select: NaN in dy is dropped where the mask is zero): sum(dz),
    sum(dz * (x - mean) * invstd), [C] each. relu without mask: the mask is recomputed as
    not (round(x*scale + shift) <= 0) with the arithmetic of `bn_apply` (one fma). `rows` is the number of partial sums
    per channel, reduced in a fixed order.
    """
    dz = behind_relu(a.dy, a.x, a.mask, a.scale, a.shift, a.relu)
    return Out(*gradient_sums(dz, a.x, a.mean, a.invstd))


def fake(a: Args) -> Out:
    return Out(vector(a.x, a.x.shape[1]), vector(a.x, a.x.shape[1]))


def refuse(a: Args) -> str | None:
    vectors = {"scale": a.scale, "shift": a.shift, "mean": a.mean, "invstd": a.invstd}
    return (
        refuse_activations(a.x, dy=a.dy)
        or refuse_vectors(a.x.device, a.x.shape[1], torch.float32, **vectors)
        or refuse_bits(a.x.numel(), a.x.device, mask=a.mask)
        or refuse_rows(a.rows)
    )


OPTIONS = {"masked": (False, True), "relu": (False, True)}


def case(make: Operands, size: Size, masked: bool = False, relu: bool = True, rows: int | None = None) -> Args:
    """Sample arguments.

    Args:
        masked: the ReLU's bits are given; else they are recomputed.
    """
    n, c, h, w = size
    mask = make.bits(n * c * h * w) if masked else None
    vectors = (*make.affine(c), *make.moments(c))
    rows = rows or partial_rows(n * h * w, c)
    return Args(make.activation(*size), make.activation(*size), mask, *vectors, relu, rows)


def compare(a: Args, actual: Out, plain: Out, truth: Out) -> list[Comparison]:
    exact = comparison.double(a)
    dz = behind_relu(exact.dy, exact.x, a.mask, exact.scale, exact.shift, a.relu)
    return comparison.gradient_sums(dz, exact.x, exact.mean, exact.invstd, actual, plain)


register(__name__, triton="bn_backward_reduce", cuda=True, cpu=True)
