"""The choice of a backend: what the user forced, else what has been verified on this device, else PyTorch's own kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

BACKENDS = ("auto", "reference", "triton", "cuda", "aten")
_forced: ContextVar[str] = ContextVar("resnet_fused_backend", default="auto")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of the `with` block, and the backward of its results, on one backend.

    An op for which that backend has a kernel that cannot run on the given inputs raises `RuntimeError` with the reason; an op for which
    it has no kernel at all (a convolution under `"cuda"`) runs on PyTorch's own.

    Args:
        name: `"auto"` (what the plan chooses), `"reference"` (plain PyTorch, op by op), `"triton"`, `"cuda"` or `"aten"` (cuDNN, oneDNN).

    Raises:
        ValueError: `name` is none of these.
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: unknown backend {name!r}; choose one of {', '.join(map(repr, BACKENDS))}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The backend of the innermost `use_backend`, or None for `"auto"`."""
    name = _forced.get()
    return None if name == "auto" else name


def default_backend(op: str, device_type: str) -> str:
    """The backend of `op` where none is forced.

    A kernel becomes the default on an architecture once it has been verified and timed there; none has been yet, so this is PyTorch's own.
    """
    return "aten"
