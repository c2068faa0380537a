"""The reference of every op as a function of its name and arguments: `reference.add_act(x, other, relu)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from resnet_fused.ops.registry import OPS


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in OPS:
        raise AttributeError(f"no op {name!r}; choose one of {', '.join(OPS)}")
    op = OPS[name]
    return lambda *values: op.reference(op.args(*values))
