"""How the results of an op are judged: beside plain PyTorch's in the same dtype and float64's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from resnet_fused import contract
from resnet_fused.ops.arithmetic import per_channel

A = TypeVar("A", bound=tuple[Any, ...])
HALF_STEP = 0.5 + 2.0**-10  # the rest is what fp32 makes of a half: some roundings of several times the grid's range


@dataclass(frozen=True)
class Comparison:
    """A result of ours beside plain PyTorch's in the same dtype and float64's.

    Attributes:
        name: of the result.
        actual: ours.
        plain: plain PyTorch's; None where bits must agree with `truth`.
        truth: float64's.
        terms: of a sum, what the magnitudes of its summands add up to; its floor is measured by that.
        within: of a result on a grid, how far every element may be from `truth`, in steps; instead of all else.
    """

    name: str
    actual: Tensor
    plain: Tensor | None
    truth: Tensor
    terms: Tensor | None = None
    within: float | None = None

    def breach(self) -> str | None:
        """How this breaks the numerics contract, or None."""
        if self.actual.shape != self.truth.shape:
            return f"{self.name} is {list(self.actual.shape)}, expected {list(self.truth.shape)}"
        if self.within is not None:
            error = float((self.actual.double() - self.truth).abs().max()) if self.truth.numel() else 0.0
            return None if error <= self.within else f"{self.name} is {error:.5f} steps from float64's"
        if self.plain is None:
            wrong = int((self.actual != self.truth).sum())
            return f"{self.name} differs in {wrong} of {self.truth.numel()} places" if wrong else None
        return contract.breach(self.actual, self.plain.to(self.actual.dtype), self.truth, self.name, terms=self.terms)


def double(args: A) -> A:
    """An op's arguments with every floating-point tensor in float64."""
    return map_tensors(args, lambda t: t.double() if t.is_floating_point() else t)


def map_tensors(args: A, function: Any) -> A:
    """An op's arguments with a function applied to every tensor."""
    return type(args)(*(function(value) if isinstance(value, Tensor) else value for value in args))


def each(names: Sequence[str], actual: Any, plain: Any, truth: Any) -> list[Comparison]:
    """One comparison for every result that is not empty."""
    found = []
    for name, ours, other, exact in zip(names, actual, plain, truth, strict=True):
        if ours.dtype == torch.uint8:  # the winners of a max pool, which ties decide as rounded
            found.append(Comparison(name, ours, None, other))
        elif ours.numel() or exact.numel():
            found.append(Comparison(name, ours, other, exact))
    return found


def on_grid(a: Any, actual: Tensor, plain: Tensor, truth: Tensor) -> list[Comparison]:
    """The result of an op that rounds it to int8: `HALF_STEP` from float64's at most.

    Args:
        a: has `dtype`, of the result, and its grid, `y_scale` and `y_zero`.
        truth: before it is rounded.
    """
    if a.dtype != torch.int8:
        return each(["the result"], [actual], [plain], [truth])
    exact = (truth / a.y_scale + a.y_zero).clamp(-128, 127)
    return [Comparison("the result", actual, None, exact, within=HALF_STEP)]


def gradient_sums(
    dz: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    actual: Sequence[Tensor],
    plain: Sequence[Tensor | None] = (None, None),
) -> list[Comparison]:
    """sum(dz) and sum(dz * (x - mean) * invstd), [C] each, of operands in float64."""
    terms = (dz, dz * (x - per_channel(mean)) * per_channel(invstd))
    found = []
    for name, ours, other, term in zip(("sum", "sum of dz*xhat"), actual, plain, terms, strict=True):
        truth = term.sum((0, 2, 3))
        found.append(Comparison(name, ours, truth if other is None else other, truth, term.abs().sum((0, 2, 3))))
    return found


def statistics(y: Tensor, rows: Sequence[Tensor]) -> list[Comparison]:
    """Mean and variance of what partial rows say of an activation, as it was rounded."""
    exact = y.double()
    variance, mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    up = y if y.dtype == torch.float64 else y.float()
    plain_variance, plain_mean = torch.var_mean(up, (0, 2, 3), correction=0)
    merged_mean, merged_variance = merge(*rows)
    return [
        Comparison("mean", merged_mean, plain_mean, mean, exact.abs().mean((0, 2, 3))),
        Comparison("variance", merged_variance, plain_variance, variance, exact.square().mean((0, 2, 3))),
    ]


def merge(mean: Tensor, m2: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of partial rows, in float64."""
    n = count.double()[:, None]
    total = n.sum()
    merged = (mean.double() * n).sum(0) / total
    return merged, (m2.double() + n * (mean.double() - merged).square()).sum(0) / total
