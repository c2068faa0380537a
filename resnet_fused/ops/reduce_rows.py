"""The sum of partial rows in a fixed order."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from resnet_fused.dispatch.heuristics import partial_rows
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_dtype
from resnet_fused.ops.registry import Size, register


class Args(NamedTuple):
    partials: Tensor  # [rows, ...]


def reference(a: Args) -> Tensor:
    """sum over dimension 0 in fp32, fixed order; [rows, ...] -> [...]"""
    return a.partials.sum(0)


def fake(a: Args) -> Tensor:
    return a.partials.new_empty(a.partials.shape[1:])


def refuse(a: Args) -> str | None:
    if a.partials.dim() == 0:
        return "partials need a dimension to sum over, got a scalar"
    return refuse_dtype(a.partials.dtype)


def case(make: Operands, size: Size) -> Args:
    return Args(make.vector(partial_rows(size[0] * size[2] * size[3], size[1]), size[1]))


register(__name__, triton="reduce_rows", cuda=True)
