"""The compiled kernels of csrc/: which were built, for what, and the one place that loads them.

A library for CUDA tensors, one that executes the same kernels on CPU tensors, for tests, and one with the kernels for
CPUs may stand side by side.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent
_KINDS = {"cuda": "cuda", "cpu": "host"}  # of the build that takes tensors on this type of device


@functools.cache
def _record(kind: str) -> dict[str, Any] | None:
    """What setup.py wrote beside a library: reason, architectures, nvcc, torch. Of kind "none", why there is none."""
    path = _PACKAGE / f"_C_{kind}.json"
    return json.loads(path.read_text()) if path.exists() else None


@functools.cache
def load(device_type: str) -> str | None:
    """Load the library for tensors on `device_type`, once. Returns why that is not possible, in one line, or None."""
    kind = _KINDS.get(device_type, "none")
    if kind == "none" or _record(kind) is None:
        others = ", ".join(device for device, other in _KINDS.items() if _record(other) is not None)
        if not others:
            return f"the compiled kernels are {status()}"
        return f"the compiled kernels ({status()}) run on {others} tensors; these are on {device_type}"
    return _load(kind)


@functools.cache
def load_cpu() -> str | None:
    """Load the kernels for CPUs. Returns why that is not possible, in one line, or None."""
    return _load("cpu") if _record("cpu") is not None else f"the kernels for CPUs are not built: {status()}"


@functools.cache
def unavailable_cpu() -> str | None:
    """Why none of the kernels for CPUs can run on this one, or None."""
    capability = torch.backends.cpu.get_cpu_capability()
    usable = capability in ("AVX2", "AVX512")
    problem = None if usable else f"they need AVX2 or AVX-512, and PyTorch runs on {capability} here"
    return problem or load_cpu()


def _load(kind: str) -> str | None:
    try:
        torch.ops.load_library(str(_PACKAGE / f"_C_{kind}.so"))
    except OSError as problem:
        return f"the compiled kernels ({_describe(kind)}) cannot be loaded: {problem}"
    return None


def operators(op: str) -> dict[str, Callable[..., Any]]:
    """The kernels of this name of every library that can be loaded, by the type of device whose tensors they take."""
    built = [device for device, kind in _KINDS.items() if _record(kind) is not None and load(device) is None]
    return {device: getattr(getattr(torch.ops, f"resnet_fused_{_KINDS[device]}"), op).default for device in built}


def status() -> str:
    """What is built, in one line: "cuda sm_80, ...", "host (...)", "cpu (...)", or "not built: why"."""
    built = (_describe(kind) for kind in (*_KINDS.values(), "cpu") if _record(kind) is not None)
    return "; ".join(built) or _describe("none")


def _describe(kind: str) -> str:
    record = _record(kind)
    if kind == "none":
        never = "this checkout has not been built; run python setup.py build_ext --inplace"
        return f"not built: {record['reason'] if record else never}"
    assert record is not None
    if kind == "host":
        return f"host (the CUDA source executed on a CPU, for tests; torch {record['torch']})"
    if kind == "cpu":
        return f"cpu (for training and freeze on a CPU; torch {record['torch']})"
    names = ", ".join(f"sm_{name}" for name in record["architectures"])
    return f"cuda {names} (nvcc {record['nvcc']}, torch {record['torch']})"
