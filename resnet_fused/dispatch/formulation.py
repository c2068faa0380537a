"""How a convolution of a training block runs - which backends, which fusions - from measured times: pure functions.

A convolution stands between passes of memory-bound kernels, and a fusion replaces a pass. Whether it pays is a sum: the
fused kernel against the plain one and the pass. The table's entries are measured that way: of a training layer's
convolutions native PyTorch's time includes the passes that a block runs around it. What is left to add here are the
passes that write a normalised activation where no convolution normalises on its way in: one forward, and one backward,
of which the data gradient spares the reading where it runs together with the weight gradient (`conv_backward`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from resnet_fused.dispatch.conv import TRAINING_OPS, ConvShape
from resnet_fused.dispatch.heuristics import Fusion, training
from resnet_fused.dispatch.lookup import entry_of, measured
from resnet_fused.dispatch.table import Choice, Problem, Table

# Of the pass that writes an activation, where the data gradient does, which reads what it normalises anyway.
WRITTEN_ALONG = 0.5

OPS = TRAINING_OPS


@dataclass(frozen=True)
class LayerPlan:
    """The backends of a layer's three convolutions, and what is fused into those that are ours."""

    fprop: str
    dgrad: str
    wgrad: str
    fusion: Fusion


def problems(
    shape: ConvShape, dtype: torch.dtype, tf32: bool, fusion: Fusion, first: bool, residual: bool
) -> tuple[Problem, Problem, Problem]:
    """What a layer asks the plan: its fprop, dgrad and wgrad with these fusions.

    Args:
        shape: of the convolution.
        dtype: of the activations.
        tf32: whether fp32 operands may be rounded to TF32.
        fusion: around it.
        first: it reads the block's input, which no batch norm stands before.
        residual: its dgrad adds the gradient that reaches the input through an identity shortcut.
    """
    prologue = fusion.prologue and not first
    gradient = fusion.dgrad_prologue
    epilogue = fusion.dgrad_epilogue and not first
    flags = (
        ("prologue",) * prologue,
        ("epilogue",) * epilogue + ("prologue",) * gradient + ("residual",) * (residual and first),
        ("dy_prologue",) * gradient + ("x_prologue",) * prologue,
    )
    fprop, dgrad, wgrad = (Problem(op, shape, dtype, tf32, flag) for op, flag in zip(OPS, flags, strict=True))
    return fprop, dgrad, wgrad


def normalisation(shape: ConvShape, dtype: torch.dtype) -> Problem:
    """The pass that writes the activation a convolution reads: `bn_apply` alone, without a residual."""
    return Problem("bn_apply", (shape.n, shape.c, shape.h, shape.w), dtype, False, ("alone",))


def by_rule(shape: ConvShape, dtype: torch.dtype, arch: int, first: bool) -> Fusion:
    """The fusions of `heuristics.training`, for a layer that may be the first of its block."""
    fusion = training(shape, dtype, arch)
    return replace(fusion, prologue=fusion.prologue and not first)


def layer(
    shape: ConvShape,
    dtype: torch.dtype,
    arch: int,
    tf32: bool,
    first: bool,
    residual: bool,
    table: Table | None,
    margin: float = 1.0,
) -> LayerPlan | None:
    """The fastest formulation of a layer, of those whose parts were all measured; None where none was.

    Args:
        shape, dtype, tf32, first, residual: see `problems`.
        arch: compute capability times ten.
        table: with the times, or None.
        margin: native PyTorch runs a convolution unless it takes this many times as long.
    """
    rule = by_rule(shape, dtype, arch, first)
    fusions = [rule] if first else [rule, replace(rule, prologue=not rule.prologue)]
    found = [(fusion, _time(shape, dtype, tf32, fusion, first, residual, table, margin)) for fusion in fusions]
    timed = [(cost[0], cost[1], fusion) for fusion, cost in found if cost is not None]
    if not timed:
        return None
    _, backends, fusion = min(timed, key=lambda one: one[0])
    return LayerPlan(*backends, fusion)


def _time(
    shape: ConvShape,
    dtype: torch.dtype,
    tf32: bool,
    fusion: Fusion,
    first: bool,
    residual: bool,
    table: Table | None,
    margin: float,
) -> tuple[float, tuple[str, str, str]] | None:
    """Milliseconds of a formulation and its backends; None where a part of it was not measured."""
    asked = problems(shape, dtype, tf32, fusion, first, residual)
    entries = [entry_of(problem, table) for problem in asked]
    chosen = [measured(problem, table, margin=margin) for problem in asked]
    applied = None if first or fusion.prologue else entry_of(normalisation(shape, dtype), table)
    if not (first or fusion.prologue) and applied is None:
        return None

    def time(choices: Sequence[Choice | None]) -> float:
        total = 0.0
        for entry, choice in zip(entries, choices, strict=True):
            if entry is None or choice is None:
                return math.inf
            total += entry.ms(choice) * shape.n / entry.problem.batch
        if applied is not None:
            passes = 1.0 + (WRITTEN_ALONG if _together(choices, fusion) else 1.0)
            total += passes * applied.ms(applied.winner) * shape.n / applied.problem.batch
        return total

    ours = [chosen[0], *(measured(problem, table, "triton") for problem in asked[1:])]
    found = ours if margin * time(ours) < time(chosen) else chosen
    backends = [choice.backend for choice in found if choice is not None]
    return (time(found), (backends[0], backends[1], backends[2])) if math.isfinite(time(found)) else None


def _together(choices: Sequence[Choice | None], fusion: Fusion) -> bool:
    """Whether one op makes both gradients."""
    _, dgrad, wgrad = (choice and choice.backend for choice in choices)
    return dgrad == wgrad != "aten" and fusion.dgrad_epilogue
