"""What the package tells torch.compile, without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.assume_constant_result`, which marks a function in just this way, but for its import of Dynamo:
    that takes as long as importing torch, and loads triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
