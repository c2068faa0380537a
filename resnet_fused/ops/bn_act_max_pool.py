"""Batch norm's affine map, ReLU and the stem's max pool in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.ops.arithmetic import like, memory_format, normalise, window_corner
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.registry import Size, register


class Args(NamedTuple):
    x: Tensor
    scale: Tensor
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


def fake(a: Args) -> Out:
    n, c, h, w = a.x.shape
    size = (n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1)
    order = memory_format(a.x)
    return Out(
        torch.empty(size, dtype=a.x.dtype, device=a.x.device, memory_format=order),
        torch.empty(size, dtype=torch.uint8, device=a.x.device, memory_format=order),
    )


def case(make: Operands, size: Size) -> Args:
    return Args(make.activation(*size), *make.affine(size[1]))


def pooled(make: Operands, size: Size) -> tuple[Args, Out]:
    """A case and its results, which are operands of the backward."""
    a = case(make, size)
    return a, fake(a) if make.device.type == "meta" else reference(a)


register(__name__, kernels=("triton", "cuda"))
