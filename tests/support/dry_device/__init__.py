"""A GPU that is not there: Triton binds, specialises, compiles, loads and launches as on one, and nothing runs.

Triton's own driver and launchers meet a libcuda.so.1 (libcuda.c) that makes a real one's checks and executes nothing.
CPU tensors - or, below the operator registry, meta tensors - stand for CUDA ones; results stay as they were allocated.
In a process of its own: Triton must not have been imported under TRITON_INTERPRET=1, and the library stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SHARED_MEMORY_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


@functools.cache
def library() -> ctypes.CDLL:
    """The stand-in for the CUDA driver, built and loaded, so that whoever opens libcuda.so.1 gets it."""
    torch.cuda.is_available()  # before: a second CUDA runtime must not find it
    import triton

    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    folder = Path(tempfile.mkdtemp(prefix="dry-device-"))
    target = folder / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-O1", "-w", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", *flags, str(Path(__file__).parent / "libcuda.c"), "-o", str(target)], check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    loaded = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
    for name in ("dry_launches", "dry_tensor_maps"):
        getattr(loaded, name).restype = ctypes.c_long
    return loaded


def _driver(arch: int) -> Any:
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_current_stream = lambda device: 0
    driver.get_device_capability = lambda device=None: divmod(arch, 10)
    return driver


@contextlib.contextmanager
def dry_device(arch: int) -> Iterator[ctypes.CDLL]:
    """Within it, Triton's kernels launch for `arch`, and the backend "triton" takes CPU tensors.

    Yields the driver's stand-in: `dry_launches()` and `dry_tensor_maps()` count.
    """
    from triton.runtime import driver

    from resnet_fused import kernels, ops
    from resnet_fused.dispatch import choice, device
    from resnet_fused.dispatch.conv import MULTIPROCESSORS
    from resnet_fused.kernels import _conv, _launch, experimental

    if _launch.INTERPRETED:
        raise RuntimeError("the dry device needs Triton's compiler: unset TRITON_INTERPRET before triton is imported")
    stand_in = library()
    stand_in.dry_set(arch, SHARED_MEMORY_KB[arch] * 1024, MULTIPROCESSORS[arch])
    for kernel in experimental.KERNELS:  # imports it
        experimental.available(kernel)
    replaced: list[tuple[Any, str, Any]] = []

    def replace(module: Any, name: str, value: Any) -> None:
        replaced.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    assert kernels and _conv
    replace(device, "_arch", lambda _: arch)
    unavailable = ops.backends._unavailable
    replace(ops.backends, "_unavailable", lambda name, kind: None if name == "triton" else unavailable(name, kind))
    for name, module in list(sys.modules.items()):
        if name.startswith("resnet_fused.kernels"):
            if hasattr(module, "refuse_device"):
                replace(module, "refuse_device", lambda device: None)
    for kernel in _kernels():
        kernel.device_caches.clear()  # what was compiled for another architecture
    driver.set_active(_driver(arch))
    choice.forget()
    try:
        yield stand_in
    finally:
        choice.forget()
        for module, name, value in reversed(replaced):
            setattr(module, name, value)


def jitted() -> dict[str, int]:
    """How many binaries of each kernel have been launched."""
    return {kernel.__name__: sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in _kernels()}


def _kernels() -> list[Any]:
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("resnet_fused.kernels")]
    every = (value for module in modules for value in vars(module).values() if hasattr(value, "device_caches"))
    return list({id(kernel): kernel for kernel in every}.values())
