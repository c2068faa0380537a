"""Batch norm's affine map, ReLU and the stem's max pool in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.ops.arithmetic import is_nhwc, like, memory_format, normalise, window_corner
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import name_of, refuse_activations, refuse_vectors
from resnet_fused.ops.registry import Size, register


class Args(NamedTuple):
    x: Tensor  # [N, C, H, W]
    scale: Tensor  # [C] fp32; so is shift
    shift: Tensor


class Out(NamedTuple):
    y: Tensor
    index: Tensor  # type: ignore[assignment]


def reference(a: Args) -> Out:
    """3x3, stride 2, padding 1 max pool of relu(x*scale + shift), each element rounded before it is compared; index:
    uint8, y's shape and strides, the winner's place 3*r + s in its window (first of equals; a NaN wins, the last NaN of
    the window, as in PyTorch)
    """
    activation = like(normalise(a.x, a.scale, a.shift).relu(), a.x)
    y, flat = F.max_pool2d(activation, 3, 2, 1, return_indices=True)
    top, left = window_corner(y)
    index = 3 * (flat // a.x.shape[3] - top) + (flat % a.x.shape[3] - left)
    return Out(y, torch.empty_like(y, dtype=torch.uint8).copy_(index))


def pooled_size(x: Tensor) -> tuple[int, ...]:
    """The size of what is pooled of `x`."""
    n, c, h, w = x.shape
    return n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1


def fake(a: Args) -> Out:
    size, order = pooled_size(a.x), memory_format(a.x)
    return Out(
        torch.empty(size, dtype=a.x.dtype, device=a.x.device, memory_format=order),
        torch.empty(size, dtype=torch.uint8, device=a.x.device, memory_format=order),
    )


def refuse(a: Args) -> str | None:
    vectors = {"scale": a.scale, "shift": a.shift}
    return refuse_activations(a.x) or refuse_vectors(a.x.device, a.x.shape[1], torch.float32, **vectors)


FAMILY = ("bn_act_max_pool", "bn_act_max_pool_backward_reduce", "bn_act_max_pool_backward_apply")


def case(make: Operands, size: Size) -> Args:
    return Args(make.activation(*size), *make.affine(size[1]))


def pooled(make: Operands, size: Size) -> tuple[Args, Out]:
    """A case and its results, which are operands of the backward."""
    a = case(make, size)
    return a, fake(a) if make.device.type == "meta" else reference(a)


def refuse_backward(dy: Tensor, index: Tensor, x: Tensor, **vectors: Tensor | None) -> str | None:
    """Why neither op of the backward can run on these arguments, or None."""
    reason = refuse_activations(x) or refuse_vectors(x.device, x.shape[1], torch.float32, **vectors)
    if reason is not None:
        return reason
    pooled = pooled_size(x)
    for name, tensor, dtype in (("dy", dy, x.dtype), ("index", index, torch.uint8)):
        if tuple(tensor.shape) != pooled:
            return f"{name} must have the shape {pooled} of the pooled {tuple(x.shape)}, got {tuple(tensor.shape)}"
        if tensor.dtype != dtype or tensor.device != x.device:
            got = f"{name_of(tensor.dtype)} on {tensor.device}"
            return f"{name} must be {name_of(dtype)} on {x.device}, got {got}"
        if not (is_nhwc(tensor) if is_nhwc(x) else tensor.is_contiguous()):
            return f"{name} has strides {tuple(tensor.stride())}, x {tuple(x.stride())}: one memory order for all"
    return None


register(__name__, triton="bn_act_max_pool", cuda=True, cpu=True)
