"""The input gradient of a batch norm, behind ReLU's mask, and the gradient of its residual."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops.arithmetic import behind_relu, input_gradient, like
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_activations, refuse_bits, refuse_half, refuse_vectors
from resnet_fused.ops.registry import Size, register


class Args(NamedTuple):
    dy: Tensor  # like x
    x: Tensor  # [N, C, H, W], what the batch norm normalised
    mask: Tensor | None  # bits of `bn_apply`, or None: recomputed from x
    scale: Tensor  # [C] fp32; so are all vectors
    shift: Tensor
    mean: Tensor
    invstd: Tensor
    sum_dy: Tensor | None  # with sum_dy_xhat, or None: the statistics were constants
    sum_dy_xhat: Tensor | None
    count: float  # type: ignore[assignment]  # pixels that the sums run over
    relu: bool  # without it dz = dy
    with_dresidual: bool  # whether to return dz


class Out(NamedTuple):
    dx: Tensor
    dresidual: Tensor


def reference(a: Args) -> Out:
    """dx = scale * (dz - sum_dy/count - (x - mean)*invstd * sum_dy_xhat/count), dz as in `bn_backward_reduce`; with the
    sums absent (statistics were constants): scale * dz. dresidual = dz, or an empty tensor.
    """
    dz = behind_relu(a.dy, a.x, a.mask, a.scale, a.shift, a.relu)
    dx = input_gradient(dz, a.x, a.scale, a.mean, a.invstd, a.sum_dy, a.sum_dy_xhat, a.count)
    return Out(dx, like(dz, a.x) if a.with_dresidual else a.x.new_empty(0))


def fake(a: Args) -> Out:
    return Out(torch.empty_like(a.x), torch.empty_like(a.x) if a.with_dresidual else a.x.new_empty(0))


def refuse(a: Args) -> str | None:
    vectors = {"scale": a.scale, "shift": a.shift, "mean": a.mean, "invstd": a.invstd}
    sums = {"sum_dy": a.sum_dy, "sum_dy_xhat": a.sum_dy_xhat}
    return (
        refuse_activations(a.x, dy=a.dy)
        or refuse_half(**sums)
        or refuse_vectors(a.x.device, a.x.shape[1], torch.float32, **vectors, **sums)
        or refuse_bits(a.x.numel(), a.x.device, mask=a.mask)
    )


OPTIONS = {"masked": (False, True), "relu": (False, True), "constant": (True, False), "with_dresidual": (False, True)}


def case(
    make: Operands,
    size: Size,
    masked: bool = False,
    relu: bool = True,
    constant: bool = False,
    with_dresidual: bool = False,
) -> Args:
    """Sample arguments.

    Args:
        masked: the ReLU's bits are given; else they are recomputed.
        constant: the statistics were constants, and there are no sums.
    """
    n, c, h, w = size
    return Args(
        dy=make.activation(*size),
        x=make.activation(*size),
        mask=make.bits(n * c * h * w) if masked else None,
        scale=make.vector(c, positive=True),
        shift=make.vector(c),
        mean=make.vector(c),
        invstd=make.vector(c, positive=True),
        sum_dy=None if constant else make.vector(c),
        sum_dy_xhat=None if constant else make.vector(c),
        count=float(n * h * w),
        relu=relu,
        with_dresidual=with_dresidual,
    )


register(__name__, triton="bn_backward_apply", cuda=True, cpu=True)
