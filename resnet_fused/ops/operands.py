"""Operands for the cases of the ops: random ones between guards, or shapes alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

GUARD = 512  # elements before and after every operand: NaN, or the largest of an integer dtype


class Operands:
    """Random operands, each (unless `guarded` is false) between guards of NaN, so that what reads or writes beside
    them shows.

    Args:
        device: where; on `"meta"` they are shapes alone.
        dtype: of activations and weights.
        nhwc: the memory order of activations; weights are KRSC.
        guarded: whether there are guards.
        seed: of the random numbers.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, nhwc: bool = True, guarded: bool = True, seed: int = 0
    ) -> None:
        self.device, self.dtype, self.nhwc = device, dtype, nhwc
        self.guarded = guarded and device.type != "meta"
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        self._made: list[tuple[Tensor, Tensor]] = []  # (storage with guards, a copy of what it held)

    def activation(self, *size: int) -> Tensor:
        n, c, h, w = size
        if not self.nhwc:
            return self._guard(self._normal(*size).to(self.dtype))
        return self._guard(self._normal(n, h, w, c).to(self.dtype)).permute(0, 3, 1, 2)

    def weight(self, k: int, c: int, r: int, s: int) -> Tensor:
        value = self._normal(k, r, s, c) * math.sqrt(2 / (c * r * s))
        return self._guard(value.to(self.dtype)).permute(0, 3, 1, 2)

    def vector(self, *shape: int, positive: bool = False, factor: float = 1.0) -> Tensor:
        """fp32, from -0.5 to 0.5, or from 0.5 to 1.5, times a factor."""
        value = torch.rand(shape, generator=self.generator, device=self.device)
        return self._guard((value + 0.5 if positive else value - 0.5) * factor)

    def int8(self, *size: int) -> Tensor:
        """An activation in NHWC order, or a weight in KRSC, of all values."""
        n, c, h, w = size
        return self.integers(n, h, w, c).permute(0, 3, 1, 2)

    def integers(self, *shape: int, dtype: torch.dtype = torch.int8, end: int = 128) -> Tensor:
        """From -end to end - 1."""
        value = torch.randint(-end, end, shape, generator=self.generator, device=self.device, dtype=dtype)
        return self._guard(value)

    @staticmethod
    def spread(*filter: int) -> int:
        """The standard deviation of a sum of so many products of two values of `int8`, about."""
        return math.isqrt(math.prod(filter)) * 74 * 74

    def affine(self, channels: int) -> tuple[Tensor, Tensor]:
        """Scale and shift."""
        return self.vector(channels, positive=True), self.vector(channels)

    def moments(self, channels: int) -> tuple[Tensor, Tensor]:
        """Mean and inverse standard deviation."""
        return self.vector(channels), self.vector(channels, positive=True)

    def coefficients(self, channels: int) -> Tensor:
        """(a, b, c) of a batch norm's backward."""
        return self._guard(torch.stack([self.vector(channels, positive=True), *self.affine(channels)]))

    def bits(self, elements: int) -> Tensor:
        shape = ((elements + 7) // 8,)
        value = torch.randint(0, 256, shape, generator=self.generator, device=self.device, dtype=torch.uint8)
        return self._guard(value)

    def damage(self) -> str | None:
        """What an op did to operands and guards it must not touch, or None."""
        for storage, before in self._made:
            size = before.numel()
            guards = torch.cat([storage[:GUARD], storage[GUARD + size :]])
            untouched = guards.isnan() if guards.is_floating_point() else guards == torch.iinfo(guards.dtype).max
            if not bool(untouched.all()):
                return "it wrote beside an operand"
            if not torch.equal(storage[GUARD : GUARD + size], before.flatten()):
                return "it changed an operand"
        return None

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _guard(self, value: Tensor) -> Tensor:
        if not self.guarded:
            return value
        filler = float("nan") if value.is_floating_point() else torch.iinfo(value.dtype).max
        storage = torch.full((value.numel() + 2 * GUARD,), filler, dtype=value.dtype, device=self.device)
        inner = storage[GUARD : GUARD + value.numel()]
        inner.copy_(value.flatten())
        self._made.append((storage, value))
        return inner.view(value.shape)
