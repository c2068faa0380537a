"""The compiled library: whether it is there, what it was built for."""

from __future__ import annotations


def load() -> str | None:
    """Load the library once; why it cannot be, or None."""
    return "the CUDA kernels were not built"


def status() -> str:
    return "not built"


def device_type() -> str | None:
    return None
