"""Top-k error and how sure one can be of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class ErrorRate:
    """`wrong` of `total` pictures.

    Args:
        wrong: pictures whose right class is not among the best k.
        total: pictures.

    Raises:
        ValueError: there are no pictures, or more wrong ones than pictures.
    """

    wrong: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.wrong <= self.total or self.total == 0:
            raise ValueError(f"ErrorRate: {self.wrong} wrong of {self.total} pictures")

    @property
    def rate(self) -> float:
        """wrong / total, between 0 and 1."""
        return self.wrong / self.total

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval for the rate on pictures of the same kind.

        Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
        """
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        n, p = self.total, self.rate
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        # exactly 0 and 1 at the ends, where rounding would leave a trace
        return (0.0 if self.wrong == 0 else centre - half), (1.0 if self.wrong == n else centre + half)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{100 * self.rate:.2f} % [{100 * low:.2f}, {100 * high:.2f}]"


def ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """The place of the right class among all, `[N]` int64: 0 where it has the highest score.

    Of equal scores the class with the smaller index comes first. Where a picture has a NaN among its scores, the right
    class comes last.

    Args:
        scores: `[N, K]`, higher is better.
        targets: `[N]`, integers in `[0, K)`.

    Raises:
        ValueError: shapes that do not fit, or a target outside the classes.
    """
    if scores.dim() != 2 or targets.shape != scores.shape[:1] or targets.is_floating_point():
        raise ValueError(
            f"ranks: scores {list(scores.shape)} and targets {list(targets.shape)} {targets.dtype} must be [N, K] and "
            "integers [N]"
        )
    classes = scores.shape[1]
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise ValueError(f"ranks: targets from {int(targets.min())} to {int(targets.max())}, but {classes} classes")
    own = scores.gather(1, targets[:, None])
    index = torch.arange(classes, device=scores.device)
    before = (scores > own) | ((scores == own) & (index < targets[:, None]))
    return before.sum(1).masked_fill(scores.isnan().any(1), classes - 1)


def top_k_error(scores: Tensor, targets: Tensor, k: Sequence[int] = (1, 5)) -> dict[int, ErrorRate]:
    """For each k, how many pictures do not have their class among the k highest scores.

    Args:
        scores: `[N, K]`, probabilities or logits; a picture with a NaN among its scores counts as wrong if k < K.
        targets: `[N]`, integers in `[0, K)`.
        k: each at most K.

    Raises:
        ValueError: as `ranks`; a k outside [1, K]; no picture.
    """
    place = ranks(scores, targets)
    for one in k:
        if not 1 <= one <= scores.shape[1]:
            raise ValueError(f"top_k_error: k = {one}, but there are {scores.shape[1]} classes")
    return {one: ErrorRate(int((place >= one).sum()), len(place)) for one in k}
