"""From partial rows to the affine map of a batch norm, the running statistics, and the activation behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops import bn_finalize
from resnet_fused.ops.arithmetic import activation
from resnet_fused.ops.comparison import Comparison, each
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_activations
from resnet_fused.ops.registry import Mutated, Size, register


class Args(NamedTuple):
    x: Tensor  # [N, C, H, W]
    mean: Tensor  # this and what follows as in `bn_finalize`
    m2: Tensor
    count: Tensor  # type: ignore[assignment]
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Annotated[Tensor | None, Mutated("a")]
    running_var: Annotated[Tensor | None, Mutated("b")]
    momentum: float
    eps: float


class Out(NamedTuple):
    scale: Tensor
    shift: Tensor
    save_mean: Tensor
    save_invstd: Tensor
    y: Tensor


def _norm(a: Args) -> bn_finalize.Args:
    return bn_finalize.Args(*a[1:])


def reference(a: Args) -> Out:
    """`bn_finalize`, and y = round(relu(x*scale + shift))"""
    norm = bn_finalize.reference(_norm(a))
    return Out(*norm, activation(a.x, norm.scale, norm.shift))


def fake(a: Args) -> Out:
    return Out(*bn_finalize.fake(_norm(a)), torch.empty_like(a.x))


def refuse(a: Args) -> str | None:
    reason = refuse_activations(a.x) or bn_finalize.refuse(_norm(a))
    if reason is None and a.mean.shape[1] != a.x.shape[1]:
        return f"mean must be [rows, {a.x.shape[1]}] as x has channels, got {tuple(a.mean.shape)}"
    return reason


OPTIONS = {"few": (False, True)}


def case(make: Operands, size: Size, few: bool = True) -> Args:
    """Sample arguments.

    Args:
        few: two rows of statistics, which one launch merges as it goes; else more than it does.
    """
    n, c, h, w = size
    rows = 2 if few else 40
    count = torch.full((rows,), n * h * w / rows, device=make.device)
    statistics = (make.vector(rows, c).double(), make.vector(rows, c, positive=True), count)
    return Args(make.activation(*size), *statistics, make.vector(c), make.vector(c), None, None, 0.1, 1e-5)


def runs_beside(op: str, options: Mapping[str, Any]) -> bool:
    """The map of a batch norm with no residual is made and applied in one op."""
    return op == "bn_apply" and not options["residual"]


def compare(a: Args, actual: Out, plain: Out, truth: Out) -> list[Comparison]:
    """y is judged by the map that was found beside it."""
    y = activation(a.x.double(), actual.scale.double(), actual.shift.double())
    return [*each(Out._fields[:4], actual[:4], plain[:4], truth[:4]), Comparison("y", actual.y, y, y)]


register(__name__, triton="bn_finalize")
