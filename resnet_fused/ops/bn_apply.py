"""The affine map of a batch norm, with residual, ReLU and the ReLU's bit mask, in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops.arithmetic import in_memory_order, is_nchw, like, normalise, pack_bits, up
from resnet_fused.ops.comparison import Comparison
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_activations, refuse_half, refuse_vectors
from resnet_fused.ops.registry import RunOp, Size, register


class Args(NamedTuple):
    x: Tensor  # [N, C, H, W]
    scale: Tensor  # [C] fp32; so are all vectors
    shift: Tensor
    residual: Tensor | None  # like x, or None
    residual_scale: Tensor | None  # None: the residual is added as it is
    residual_shift: Tensor | None  # with residual_scale or not at all
    relu: bool  # whether act is ReLU, which keeps NaN; else the identity
    with_mask: bool  # whether to return the mask


class Out(NamedTuple):
    y: Tensor
    mask: Tensor


def reference(a: Args) -> Out:
    """y = round(act(x*scale + shift + (residual_scale*residual + residual_shift))); mask: uint8 [ceil(numel/8)], bit
    i%8 of byte i//8 is "the gradient passes element i" in memory order, that is not (y <= 0): a NaN passes. Without
    with_mask: an empty tensor.
    """
    value = normalise(a.x, a.scale, a.shift)
    if a.residual is not None:
        if a.residual_scale is not None and a.residual_shift is not None:
            value = value + normalise(a.residual, a.residual_scale, a.residual_shift)
        else:
            value = value + up(a.residual)
    y = like(value.relu() if a.relu else value, a.x)
    if not a.with_mask:
        return Out(y, a.x.new_empty(0, dtype=torch.uint8))
    is_nchw(a.x)  # the bits are read beside x
    return Out(y, pack_bits(~(in_memory_order(y) <= 0)))


def fake(a: Args) -> Out:
    bits = (a.x.numel() + 7) // 8 if a.with_mask else 0
    return Out(torch.empty_like(a.x), a.x.new_empty(bits, dtype=torch.uint8))


def refuse(a: Args) -> str | None:
    if a.residual_scale is not None and a.residual is None:
        return "residual_scale comes with a residual, got none"
    residual = {"residual_scale": a.residual_scale, "residual_shift": a.residual_shift}
    return (
        refuse_half(**residual)
        or refuse_activations(a.x, residual=a.residual)
        or refuse_vectors(a.x.device, a.x.shape[1], torch.float32, scale=a.scale, shift=a.shift, **residual)
    )


FAMILY = ("bn_stats", "bn_finalize", "bn_apply", "bn_backward_reduce", "bn_backward_apply")
OPTIONS = {"residual": ("", "plain", "affine"), "relu": (False, True), "with_mask": (False, True)}


def case(make: Operands, size: Size, residual: str = "", relu: bool = True, with_mask: bool = False) -> Args:
    """Sample arguments.

    Args:
        residual: `""` for none, `"plain"`, or `"affine"` for one behind a batch norm of its own.
    """
    channels = size[1]
    return Args(
        x=make.activation(*size),
        scale=make.vector(channels, positive=True),
        shift=make.vector(channels),
        residual=make.activation(*size) if residual else None,
        residual_scale=make.vector(channels, positive=True) if residual == "affine" else None,
        residual_shift=make.vector(channels) if residual == "affine" else None,
        relu=relu,
        with_mask=with_mask and relu,
    )


def compare(a: Args, actual: Out, plain: Out, truth: Out) -> list[Comparison]:
    found = [Comparison("y", actual.y, plain.y, truth.y)]
    if a.with_mask:  # the bits tell of the result beside them, which rounding may put on either side of zero
        found.append(Comparison("mask", actual.mask, None, pack_bits(~(in_memory_order(actual.y) <= 0))))
    return found


def normalised(run: RunOp, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """relu(x*scale + shift) by a pass, x itself without a scale: what a convolution reads that normalises nothing."""
    if scale is None:
        return x
    none = dict.fromkeys(("residual", "residual_scale", "residual_shift"))
    value: Tensor = run("bn_apply", x=x, scale=scale, shift=shift, **none, relu=True, with_mask=False)[0]
    return value


register(__name__, triton="bn_apply", cuda=True, cpu=True)
