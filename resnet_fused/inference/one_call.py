"""A frozen network, or a part of it, as one call of our kernels for CPUs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.fusion.recognise import generate
from resnet_fused.fusion.trace import trace
from resnet_fused.inference.int8 import Quantised
from resnet_fused.inference.value import Apart, Value
from resnet_fused.nn.eligibility import calls_forward, untouched
from resnet_fused.ops import cpu
from resnet_fused.ops.onednn import Grid


def join(module: nn.Module, *values: Value | None) -> Value:
    """The result of a module, whose ops are added to the call.

    Raises:
        Apart, Untraceable: they cannot be; or whatever a forward raises that is given no tensor.
    """
    if hasattr(module, "join_call"):
        return module.join_call(*values)  # type: ignore[no-any-return, operator]
    cls = type(module)
    if cls in _OTHERS and untouched(module, cls):
        return _OTHERS[cls](module, *values)
    traced = trace(module, training=False)
    if traced.full or not calls_forward(cls):
        raise Apart
    _, forward = generate(traced.graph, cls.__name__)
    return forward(StandIn(module), *values)  # type: ignore[no-any-return]


def in_turn(modules: Iterable[nn.Module], x: Value) -> Value:
    """The result of the last module, each given that of the one before."""
    return functools.reduce(lambda value, module: join(module, value), modules, x)


_OTHERS: dict[type[nn.Module], Callable[..., Value]] = {
    nn.Identity: lambda module, x: x,
    nn.Dropout: lambda module, x: x,  # a frozen network is in eval mode
    nn.Flatten: lambda module, x: x.flatten(module.start_dim, module.end_dim),
    nn.Sequential: in_turn,
}


class StandIn:
    """A module in a forward that is run on values: what it calls of its children joins the call."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return StandIn(found) if isinstance(found, nn.Module) else found

    def __call__(self, *values: Value) -> Value:
        return join(self._module, *values)

    def _run_unit(self, k: int, x: Value, residual: Value | None = None) -> Value:
        return self._module.join_unit(k, x, residual)  # type: ignore[no-any-return, operator]


class OneCall:
    """A module with `join_call` in one call, which one image may wait for less than for Python between its ops."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        # by what the input is
        self._calls: dict[tuple[torch.dtype, Grid | None], tuple[cpu.Steps, Value] | None] = {}

    @functools.cached_property  # a copy is made of a module that has no parts yet
    def _hooks(self) -> list[dict[int, Any]]:
        everywhere = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
        own = ((part._forward_hooks, part._forward_pre_hooks) for part in self.module.modules())
        return [*everywhere, *(hooks for pair in own for hooks in pair)]

    def __deepcopy__(self, memo: dict[int, Any]) -> OneCall:
        return OneCall(copy.deepcopy(self.module, memo))

    def __call__(self, x: Tensor) -> Tensor | None:
        """The result, or None where the module is to run its ops one by one."""
        if torch.compiler.is_compiling() or type(x) not in (Tensor, Quantised) or any(self._hooks):
            return None
        kind = (x.dtype, x.grid if isinstance(x, Quantised) else None)
        if kind not in self._calls:
            self._calls[kind] = self._call(*kind)
        made = self._calls[kind]
        if made is None:
            return None
        steps, result = made
        try:
            y = steps(x.eight() if isinstance(x, Quantised) else x)
        except RuntimeError:  # one by one they say in PyTorch's words what is wrong
            return None
        if result.grid is not None:
            return Quantised(y, result.grid, result.dtype, nchw=False)
        return y.flatten(1) if result.pixels == "none" else y

    def _call(self, dtype: torch.dtype, grid: Grid | None) -> tuple[cpu.Steps, Value] | None:
        steps = cpu.Steps()
        try:
            result = join(self.module, Value(steps, 0, dtype, grid))
        except Exception:  # see join
            return None
        return (steps, result) if isinstance(result, Value) and 0 < result.number == len(steps) else None
