"""The convolutions of frozen blocks as one call of our kernels for CPUs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resnet_fused.inference.conv import FrozenConv, Value
from resnet_fused.inference.int8 import Quantised
from resnet_fused.ops import cpu
from resnet_fused.ops.onednn import Grid

if TYPE_CHECKING:
    from resnet_fused.inference.block import FrozenBlock


class OneCall:
    """The convolutions of blocks in one call, which one image may wait for less than for Python between them.

    Args:
        blocks: each reads the result of the one before.
    """

    def __init__(self, blocks: Sequence[FrozenBlock]) -> None:
        self.blocks = tuple(blocks)
        self._calls: dict[Grid | None, tuple[cpu.Convs, Value] | None] = {}  # by what 8 bits of the input stand for

    @functools.cached_property  # a copy is made of blocks that have no parts yet
    def _parts(self) -> list[nn.Module]:
        return [part for block in self.blocks for part in block.modules()]

    @functools.cached_property
    def _dtypes(self) -> set[torch.dtype]:
        return {part.dtype for part in self._parts if isinstance(part, FrozenConv)}

    def __deepcopy__(self, memo: dict[int, Any]) -> OneCall:
        return OneCall(copy.deepcopy(self.blocks, memo))

    def __call__(self, x: Tensor) -> Tensor | None:
        """The result, or None where the blocks are to run it one by one."""
        if torch.compiler.is_compiling() or type(x) not in (Tensor, Quantised):
            return None
        grid = x.grid if isinstance(x, Quantised) else None
        if grid not in self._calls:
            self._calls[grid] = self._call(grid)
        made = self._calls[grid]
        if made is None or {x.dtype} != self._dtypes:
            return None
        if any(part._forward_hooks or part._forward_pre_hooks for part in self._parts):
            return None
        convs, result = made
        try:
            y = convs(x.eight() if isinstance(x, Quantised) else x)
        except RuntimeError:  # one by one they say in PyTorch's words what is wrong
            return None
        return y if result.grid is None else Quantised(y, result.grid, x.dtype, nchw=False)

    def _call(self, grid: Grid | None) -> tuple[cpu.Convs, Value] | None:
        convs = cpu.Convs()
        value: Value | None = Value(0, grid)
        for block in self.blocks:
            value = None if value is None else block.join_call(convs, value)
        return None if value is None else (convs, value)
