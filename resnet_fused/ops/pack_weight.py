"""A filter in the memory order that a kernel reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_dtype
from resnet_fused.ops.registry import Size, register


class Args(NamedTuple):
    weight: Tensor  # [K, C, R, S], any strides
    flip: bool  # for dgrad


def reference(a: Args) -> Tensor:
    """KRSC copy, contiguous [K, R, S, C]; flip: [C, R, S, K] with r, s reversed (for dgrad)"""
    if a.flip:
        return a.weight.flip(2, 3).permute(1, 2, 3, 0).clone(memory_format=torch.contiguous_format)
    return a.weight.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)


def fake(a: Args) -> Tensor:
    k, c, r, s = a.weight.shape
    return a.weight.new_empty((c, r, s, k) if a.flip else (k, r, s, c))


def refuse(a: Args) -> str | None:
    if a.weight.dim() != 4:
        return f"the weight must be 4-D [K, C/groups, R, S], got {a.weight.dim()}-D"
    return refuse_dtype(a.weight.dtype)


OPTIONS = {"flip": (False, True)}


def case(make: Operands, size: Size, flip: bool = False) -> Args:
    return Args(make.weight(*size), flip)


register(__name__, triton="pack_weight", cuda=True)
