"""A result within one call, as far as it is known before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from resnet_fused.ops import cpu
from resnet_fused.ops.onednn import Grid


class Apart(Exception):
    """What a module computes is no step of one call."""


@dataclass(frozen=True)
class Value:
    """A result within one call.

    A forward is run on it once to see what it computes; what it does to a value that is no step raises `Apart`.

    Attributes:
        steps: of the call so far.
        number: of the result among theirs.
        dtype: of the result, or of the float tensor that its 8 bits stand for.
        grid: what the 8 bits stand for.
        pixels: "many", or "one" pixel an image, or "none": [N, C].
    """

    steps: cpu.Steps
    number: int
    dtype: torch.dtype
    grid: Grid | None = None
    pixels: str = "many"

    @property
    def element(self) -> torch.dtype:
        """The dtype that it has in memory."""
        return self.dtype if self.grid is None else torch.uint8

    def floats(self, dtype: torch.dtype) -> int:
        """Its number, where it is an image in this dtype."""
        if self.grid is not None or self.dtype is not dtype or self.pixels == "none":
            raise Apart
        return self.number

    def eight(self, grid: Grid) -> tuple[int, Grid]:
        """The number of an image in 8 bits, and what they stand for: floats are rounded to `grid`."""
        if self.grid is not None:
            return self.number, self.grid
        return self.steps.quantise(self.floats(self.dtype), grid), grid

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Value:
        if self.pixels == "many" or (start_dim, end_dim) != (1, -1):
            raise Apart
        return replace(self, pixels="none")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.flatten:
            raise Apart
        return args[0].flatten(*args[1:], **(kwargs or {}))
