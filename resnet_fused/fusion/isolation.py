"""What a trace must neither depend on nor change: tensors, contexts of PyTorch, random generators."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Untraceable(Exception):
    """The forward is not the graph that tracing would give; the message says why."""


class NoTensorWork(TorchDispatchMode):
    """A trace handles proxies only; a tensor made or changed on the way would be a constant afterwards."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Untraceable(f"its forward computes on tensors that do not come from its inputs ({func})")


def ambient() -> tuple[Any, ...]:
    """The thread's state that contexts such as no_grad, autocast or saved-tensor hooks change."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        *(torch.get_autocast_dtype(device) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


@contextlib.contextmanager
def surroundings(gradients: bool) -> Iterator[None]:
    """Gradients on and autocast off, or the other way: what a forward does must not depend on them."""
    before = {device: torch.is_autocast_enabled(device) for device in ("cpu", "cuda")}
    try:
        for device in before:
            torch.set_autocast_enabled(device, not gradients)
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            yield
    finally:
        for device, enabled in before.items():
            torch.set_autocast_enabled(device, enabled)


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Random generators are put back; a forward that used one is refused. (PyTorch's are refused as tensor work.)"""
    generators: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [(random.getstate, random.setstate)]
    if "numpy.random" in sys.modules:
        numpy_random = sys.modules["numpy.random"]
        generators.append((lambda: _comparable(numpy_random.get_state()), numpy_random.set_state))
    before = [get() for get, _ in generators]
    try:
        yield
    finally:
        changed = False
        for (get, put), state in zip(generators, before, strict=True):
            if get() != state:
                put(state)
                changed = True
    if changed:
        raise Untraceable("its forward draws random numbers")


def _comparable(state: Any) -> tuple[Any, ...]:
    return tuple(part.tolist() if hasattr(part, "tolist") else part for part in state)
