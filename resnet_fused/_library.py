"""The compiled kernels of csrc/: whether they were built, for what, and the one place that loads them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent
_LIBRARY, _RECORD = _PACKAGE / "_C.so", _PACKAGE / "_build_info.json"
_DEVICE_TYPES = {"cuda": "cuda", "host": "cpu"}


@functools.cache
def _record() -> dict[str, Any]:
    """What setup.py wrote beside the library: kind, reason, architectures, nvcc, torch."""
    if not _RECORD.exists():
        return {"kind": "none", "reason": "this checkout has not been built; run python setup.py build_ext --inplace"}
    return json.loads(_RECORD.read_text())


@functools.cache
def load() -> str | None:
    """Load the library, once. Returns why it cannot be, in one line, or None."""
    if device_type() is None:
        return f"the compiled kernels are not built: {_record()['reason']}"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as problem:
        return f"the compiled kernels ({status()}) cannot be loaded: {problem}"
    return None


def device_type() -> str | None:
    """The type of device whose tensors the library takes: "cuda", "cpu" (a host build), or None without one."""
    return _DEVICE_TYPES.get(_record()["kind"])


def has(op: str) -> bool:
    """Whether the library can be loaded and has a kernel for the op of this name."""
    return load() is None and hasattr(torch.ops.resnet_fused_cuda, op)


def status() -> str:
    """What is built, in one line: "cuda sm_80, ...", "host ..." or "not built: why"."""
    record = _record()
    if record["kind"] == "cuda":
        names = ", ".join(f"sm_{name}" for name in record["architectures"])
        return f"cuda {names} (nvcc {record['nvcc']}, torch {record['torch']})"
    if record["kind"] == "host":
        return f"host, the CUDA kernels on CPU tensors (torch {record['torch']})"
    return f"not built: {record['reason']}"
