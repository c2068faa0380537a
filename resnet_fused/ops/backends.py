"""Where each op's implementations live, and why one cannot run: dispatcher and error message are the same predicate."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fused import _library
from resnet_fused._compiling import constant
from resnet_fused.dispatch.device import assumed
from resnet_fused.ops import cudnn_graphs
from resnet_fused.ops.arithmetic import is_nhwc
from resnet_fused.ops.refusals import refuse_dtype
from resnet_fused.ops.registry import OPS

CPU_DTYPES = (torch.float32, torch.bfloat16)
CUDNN = {"conv_fprop": cudnn_graphs.conv_fprop}  # in inference alone: `implements` says no


def implements(backend: str, op: str) -> bool:
    """Whether `backend` has a kernel for `op` at all, on whatever device; `"cudnn"` has its graphs, which are for
    `freeze`.
    """
    if op not in OPS or backend == "reference":
        return op in OPS
    return OPS[op].native is not None if backend == "aten" else backend in OPS[op].kernels


@constant
def unavailable(backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run anything on `device_type` here, or None if it can."""
    return None if assumed() else _unavailable(backend, device_type)


@functools.cache
def _unavailable(backend: str, device_type: str) -> str | None:
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device_type == "cuda":
            return None
        if device_type == "cpu" and _interpreting():
            # Of some versions of numpy the interpreter cannot run a kernel at all.
            problem: str | None = importlib.import_module("resnet_fused.kernels._launch").refuse_device(
                torch.device("cpu")
            )
            return problem
        where = "CUDA tensors, or on CPU tensors under TRITON_INTERPRET=1"
        return f"Triton kernels run on {where}; these are on {device_type}"
    if backend == "cuda":
        return _library.load(device_type)
    if backend == "cpu":
        where = f"the kernels for CPUs run on CPU tensors; these are on {device_type}"
        return _library.unavailable_cpu() if device_type == "cpu" else where
    if backend == "cudnn":
        return cudnn_graphs.unavailable(device_type)
    return None


def available(backend: str, device_type: str) -> bool:
    """Whether `backend` can run on tensors of `device_type` here."""
    return unavailable(backend, device_type) is None


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def subclassed(t: Tensor) -> bool:
    """Whether `t` is of a class that may give operations another meaning."""
    return (
        type(t) is not Tensor and type(t) is not torch.nn.Parameter and not isinstance(t, torch._subclasses.FakeTensor)
    )


def refusal(backend: str, op: str, x: Tensor, *others: Tensor | None) -> str | None:
    """Why `backend` cannot run `op` on activations `x` and `others`, or None if it can.

    Args:
        backend: one of `"reference"`, `"aten"`, `"triton"`, `"cuda"`, `"cpu"`.
        op: an op's name.
        x: the activation that decides the shape, dtype and device.
        others: further activations of the same shape, which must agree with it (None is passed over).
    """
    if backend == "aten":
        return None
    if not implements(backend, op):
        return f"{backend} has no {op} kernel"
    problem = unavailable(backend, x.device.type)
    if problem is not None:
        return problem
    if subclassed(x):
        return f"the input is a {type(x).__name__}, not a plain tensor"
    if x.dim() != 4:
        return f"activations must be 4-D [N, C, H, W], got {x.dim()}-D"
    if backend != "reference" and (problem := refuse_dtype(x.dtype)) is not None:
        return problem
    if backend == "cpu":
        if (problem := refuse_dtype(x.dtype, CPU_DTYPES)) is not None:
            return problem
        if not is_nhwc(x):
            return f"the kernels for CPUs read channels_last activations, got strides {tuple(x.stride())}"
    if not x.is_floating_point():
        return f"activations must be floating point, got {str(x.dtype).removeprefix('torch.')}"
    for other in others:
        if other is None:
            continue
        if subclassed(other):
            return f"the input is a {type(other).__name__}, not a plain tensor"
        if other.shape != x.shape:
            return f"shapes differ: {list(x.shape)} and {list(other.shape)}"
        if other.dtype != x.dtype:
            return f"dtypes differ: {x.dtype} and {other.dtype}"
        if other.device != x.device:
            return f"devices differ: {x.device} and {other.device}"
    return None


def conv_refusal(
    backend: str,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    geometry: tuple[tuple[int, int], tuple[int, int], tuple[int, int], int],
) -> str | None:
    """Why `backend` cannot run `conv_fprop` of these operands, beyond what `refusal` says.

    Args:
        geometry: (stride, padding, dilation, groups).
    """
    if backend != "triton":
        return None
    from resnet_fused.kernels import refuse

    a = OPS["conv_fprop"].args(x, weight, None, None, residual, *geometry, None)
    reason: str | None = refuse("conv_fprop", a)
    return reason


@functools.cache
def implementation(backend: str, op: str) -> Callable[..., Any]:
    """The function that runs `op` on `backend`; its arguments are the op's without `backend`."""
    record = OPS[op]
    if backend == "reference":
        return lambda *values: record.reference(record.args(*values))
    if backend == "aten" and (native := record.native) is not None:
        return lambda *values: native(record.args(*values))
    if backend == "triton" and implements(backend, op):
        checked: Callable[[str], Callable[..., Any]] = importlib.import_module("resnet_fused.kernels").checked
        return checked(op)
    if backend == "cudnn" and op in CUDNN:
        return CUDNN[op]
    if backend == "cuda" and implements(backend, op):
        kernels = _library.operators(op)
        if not kernels:
            raise RuntimeError(f"{op}: backend 'cuda' cannot run: {_library.load('cuda')}")
        if len(kernels) == 1:
            return next(iter(kernels.values()))
        return lambda x, *others: kernels[x.device.type](x, *others)
    if backend == "cpu" and implements(backend, op):
        if (problem := unavailable(backend, "cpu")) is not None:
            raise RuntimeError(f"{op}: backend 'cpu' cannot run: {problem}")
        kernel: Callable[..., Any] = getattr(torch.ops.resnet_fused_cpu, op).default
        return kernel
    have = [name for name in ("reference", "triton", "cuda", "cpu", "aten") if implements(name, op)]
    raise ValueError(f"{op}: no backend {backend!r}; choose one of {', '.join(map(repr, have))}")


def called(op: str) -> Callable[..., Any]:
    """`torch.ops.resnet_fused.<op>`; on plain tensors and backend `"cpu"` its kernel itself, for Python's part of the
    dispatcher takes as long as a small pass. Whoever watches the ops by a mode sees them all."""

    def run(*values: Any, backend: str) -> Any:
        if backend == "cpu" and type(values[0]) is Tensor and not torch.compiler.is_compiling():
            if torch._C._len_torch_dispatch_stack() == 0:
                return implementation("cpu", op)(*values)
        return getattr(torch.ops.resnet_fused, op)(*values, backend=backend)

    return run
