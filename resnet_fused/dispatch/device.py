"""The compute capability by which launch configurations and measured tables are chosen."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from resnet_fused._compiling import constant

MIN_ARCH = 80


@constant
def arch(device: torch.device) -> int:
    """The compute capability times ten of a GPU, 80 for sm_80 and so on; of any other device the smallest supported."""
    return _arch(device) if _assumed is None else _assumed


_assumed: int | None = None


@contextmanager
def assume_gpu(arch: int) -> Iterator[None]:
    """Within it every device counts as a GPU of this architecture on which every backend runs: for those who compile,
    count or plan on tensors without memory.
    """
    global _assumed
    before, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = before


def assumed() -> bool:
    """Whether `assume_gpu` holds."""
    return _assumed is not None


@functools.cache
def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return MIN_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
