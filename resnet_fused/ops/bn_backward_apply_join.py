"""The input gradients of the two batch norms whose sum, rectified, ends a block, in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops.arithmetic import input_gradient, select, unpack_bits, up
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_activations, refuse_bits, refuse_vectors
from resnet_fused.ops.registry import Size, register


class Args(NamedTuple):
    dy: Tensor  # like x
    x: Tensor  # [N, C, H, W], what the branch's batch norm normalised
    mask: Tensor  # bits of `bn_apply`
    scale: Tensor  # [C] fp32; so are all vectors
    mean: Tensor
    invstd: Tensor
    sum_dz: Tensor  # of dz = mask ? dy : 0, as `conv_dgrad_join` gives it
    sum_dz_xhat: Tensor
    shortcut: Tensor  # like x, what the projection's batch norm normalised
    shortcut_scale: Tensor
    shortcut_mean: Tensor
    shortcut_invstd: Tensor
    sum_dz_shortcut: Tensor
    count: float  # type: ignore[assignment]  # pixels that the sums run over


class Out(NamedTuple):
    dx: Tensor
    dshortcut: Tensor


def reference(a: Args) -> Out:
    """dx of `bn_backward_apply` with relu and this mask, and dshortcut, the same of the projection's batch norm, from
    shortcut, its vectors, sum_dz and sum_dz_shortcut.
    """
    dz = select(unpack_bits(a.mask, a.x), up(a.dy))
    other = (a.shortcut, a.shortcut_scale, a.shortcut_mean, a.shortcut_invstd)
    return Out(
        input_gradient(dz, a.x, a.scale, a.mean, a.invstd, a.sum_dz, a.sum_dz_xhat, a.count),
        input_gradient(dz, *other, a.sum_dz, a.sum_dz_shortcut, a.count),
    )


def fake(a: Args) -> Out:
    return Out(torch.empty_like(a.x), torch.empty_like(a.x))


def refuse(a: Args) -> str | None:
    vectors = {name: t for name, t in a._asdict().items() if isinstance(t, Tensor) and t.dim() == 1 and name != "mask"}
    return (
        refuse_activations(a.x, dy=a.dy, shortcut=a.shortcut)
        or refuse_vectors(a.x.device, a.x.shape[1], torch.float32, **vectors)
        or refuse_bits(a.x.numel(), a.x.device, mask=a.mask)
    )


def case(make: Operands, size: Size) -> Args:
    n, c, h, w = size
    return Args(
        dy=make.activation(*size),
        x=make.activation(*size),
        mask=make.bits(n * c * h * w),
        scale=make.vector(c, positive=True),
        mean=make.vector(c),
        invstd=make.vector(c, positive=True),
        sum_dz=make.vector(c),
        sum_dz_xhat=make.vector(c),
        shortcut=make.activation(*size),
        shortcut_scale=make.vector(c, positive=True),
        shortcut_mean=make.vector(c),
        shortcut_invstd=make.vector(c, positive=True),
        sum_dz_shortcut=make.vector(c),
        count=float(n * h * w),
    )


def runs_beside(op: str, options: Mapping[str, Any]) -> bool:
    """A block may end in the sum of two batch norms."""
    return op == "bn_apply" and options["residual"] == "affine"


register(__name__, triton="bn_backward_apply")
