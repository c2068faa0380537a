"""What every launcher shares: the devices, the width of an index, and the launch."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused._compiling import constant
from resnet_fused.dispatch.device import MIN_ARCH, arch, assumed
from resnet_fused.kernels._replay import watching

# Read once: the jit decorator chose between the compiler and the interpreter at the same moment.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def refuse_device(device: torch.device) -> str | None:
    """Why no Triton kernel can run on `device`, or None."""
    if assumed():
        return None
    if device.type == "cuda":
        if arch(device) < MIN_ARCH:
            return f"the GPU has compute capability {arch(device) / 10}, the kernels need {MIN_ARCH / 10} or newer"
        return None
    if device.type == "cpu" and INTERPRETED:
        return _interpreter_problem()
    return (
        "Triton kernels run on CUDA tensors, or on CPU tensors when TRITON_INTERPRET=1 is set before triton is first "
        f"imported; got {device.type} tensors"
    )


@triton.jit
def _count(steps):
    for _ in range(steps):
        pass


@constant
def _interpreter_problem() -> str | None:
    """Why Triton's interpreter cannot run a loop here, or None: that of Triton 3.6 fails with numpy 2.4 and newer."""
    return _try_a_loop()


@functools.cache
def _try_a_loop() -> str | None:
    try:
        _count[(1,)](2)
    except Exception as error:
        numpy = importlib.import_module("numpy").__version__
        return (
            f"the interpreter of Triton {triton.__version__} does not work with numpy {numpy} ({error}); try numpy<2.4"
        )
    return None


def index_type(*numels: int) -> tl.dtype:
    """The type of element offsets: 64-bit only where a tensor (and the tile that overhangs its end) needs it."""
    return tl.int64 if max(numels) > 2**31 - 2**20 else tl.int32


def empty_nhwc(like: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """An activation of this size, on the device of `like` and of its dtype, if not of another: what every convolution
    here returns.
    """
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def launch(kernel: Any, grid: int, *args: Any, **options: Any) -> None:
    """Run `kernel` on `grid` programs, on the device of its first argument. The grid is 1-D: the one dimension CUDA
    does not limit to 65,535.
    """
    if grid > 0:
        with torch.cuda.device_of(args[0]):
            watch = watching()
            if watch is None:
                kernel[(grid,)](*args, **options)
            else:
                watch.launch(kernel, grid, args, options)
