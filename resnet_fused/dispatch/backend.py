"""The choice of a backend: what the user forced, else what was verified on this device, else native PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from resnet_fused import _library
from resnet_fused._compiling import constant
from resnet_fused.dispatch import choice
from resnet_fused.dispatch.device import arch, assumed

BACKENDS = ("auto", "reference", "triton", "cuda", "cpu", "cudnn", "aten")
# A plain global, as PyTorch's backend switches are: torch.compile guards on it, which it cannot on a ContextVar in
# torch 2.11.
_forced = "auto"
_ON_CPU = frozenset({"bn_apply", "bn_act_max_pool"})  # by which their families are chosen


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of the `with` block, and the backward of its results, on one backend, in all threads.

    An op for which that backend has a kernel that cannot run on the given inputs raises `RuntimeError` with the
    reason, or PyTorch's exception where PyTorch refuses them too; `"reference"` runs whatever PyTorch runs. An op
    for which a backend has no kernel at all (a convolution under `"cuda"`) runs on native PyTorch. `"cudnn"` is for
    `freeze` alone: its convolutions as fused graphs of cuDNN's, which needs the package nvidia-cudnn-frontend.

    Args:
        name: `"auto"` (what the plan chooses), `"reference"` (plain PyTorch, op by op), `"triton"`, `"cuda"`,
            `"cpu"` (batch norm, ReLU, residual and the stem's pool in C++, of channels_last tensors), `"cudnn"` or
            `"aten"` (native PyTorch: cuDNN, oneDNN).

    Raises:
        ValueError: `name` is none of these.
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: unknown backend {name!r}; choose one of {', '.join(map(repr, BACKENDS))}")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced_backend() -> str | None:
    """The backend of the innermost `use_backend`, or None for `"auto"`."""
    return None if _forced == "auto" else _forced


@constant
def default_backend(op: str, device_type: str) -> str:
    """The backend of `op` where none is forced: on a GPU what the measured tables say, on a CPU our kernels for batch
    norm where they were built, elsewhere native PyTorch.

    A kernel becomes the default on an architecture once it has been verified and timed there.
    """
    if device_type == "cpu" and op in _ON_CPU and not assumed() and _library.unavailable_cpu() is None:
        return "cpu"
    if device_type != "cuda" or not torch.cuda.is_available():
        return "aten"
    return choice.default_on(arch(torch.device("cuda", torch.cuda.current_device())), op)
