"""Formulations on experimental Triton APIs (host tensor descriptors, Gluon): candidates for the plan, never defaults.

A Triton release can break what is in here and nothing else: importing this package never raises, `available` says what
is missing, and the caller falls back to the pointer kernel.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.device import arch
from resnet_fused.dispatch.experimental import GRADIENTS, KERNELS, refuse_shape, tiling
from resnet_fused.kernels._launch import INTERPRETED, empty_nhwc, refuse_device
from resnet_fused.ops import conv_fprop as plain
from resnet_fused.ops import conv_fprop_stats as stats
from resnet_fused.ops.registry import OPS

_MODULES = {
    "tma_gemm": "tma",
    "tma_conv": "tma",
    "tma_gemm_ws": "tma",
    "tma_conv_ws": "tma",
    "wgmma_conv": "wgmma",
    "tcgen05_conv": "tcgen05",
}


GRADIENT = "_dgrad"  # behind the name of a module, that of its data gradient


@functools.cache
def _module(kernel: str, which: str = "") -> Any:
    return importlib.import_module(f"resnet_fused.kernels.experimental.{_MODULES[kernel]}{which}")


@functools.cache
def available(kernel: str) -> str | None:
    """Why this Triton cannot express `kernel` (one of `dispatch.experimental.KERNELS`), or None."""
    if kernel not in _MODULES:
        return f"no experimental kernel {kernel!r}; choose one of {', '.join(KERNELS)}"
    try:
        _module(kernel)
        if kernel in GRADIENTS:
            _module(kernel, GRADIENT)
    except Exception as error:  # an experimental API may be missing, renamed or broken in any way
        import triton

        return f"{kernel} does not load with Triton {triton.__version__}: {type(error).__name__}: {error}"
    return None


_COPIED = ("x", "dy", "weight", "residual", "shortcut")  # by TMA: operands of all these ops, by their names


def refuse(a: Any, config: ConvConfig) -> str | None:
    """Why the formulation of `config` cannot run the first convolution of an op on arguments, as its record has them,
    that the op's own launcher accepts, or None.
    """
    reason = available(config.kernel) or refuse_device(a[0].device)
    if reason is not None:
        return reason
    if INTERPRETED and not config.kernel.startswith("tma"):
        return f"{config.kernel} is written in Gluon, which Triton's interpreter does not run"
    record = next(record for record in OPS.values() if type(a) is record.args)
    problem, *_ = record.problems(a)
    assert isinstance(problem.shape, ConvShape)
    if "prologue" in problem.flags:
        return _no_prologue(config)
    if getattr(a, "act", None) not in (None, "relu"):
        return f"the formulation {config.kernel!r} has no {a.act}; choose 'pointer'"
    # The interpreter copies boxes on any machine.
    capability = 90 if INTERPRETED else arch(a[0].device)
    reason = refuse_shape(problem.shape, problem.dtype, capability, config, problem.op)
    if reason is not None:
        return reason
    for name in _COPIED:
        tensor = getattr(a, name, None)
        if tensor is not None and tensor.data_ptr() % 16:
            return f"TMA needs tensors that start at a multiple of 16 bytes, {name} starts at {tensor.data_ptr():#x}"
    return None


def _no_prologue(config: ConvConfig) -> str:
    return f"the formulation {config.kernel!r} has no prologue; choose 'pointer'"


def conv_fprop(a: plain.Args, config: ConvConfig) -> Tensor:
    """Launch `ops.conv_fprop` by the formulation `config.kernel`, for which `refuse` must have returned None."""
    shape, krsc = plain.conv_shape(a), a.weight.contiguous(memory_format=torch.channels_last)
    y, nothing = empty_nhwc(a.x, *shape.output), (None, None, None)
    _module(config.kernel).run(a.x, krsc, a.scale, a.shift, a.residual, y, nothing, shape, a.act == "relu", config)
    return y


def conv_fprop_stats(a: stats.Args, config: ConvConfig) -> stats.Out:
    """Launch `ops.conv_fprop_stats` likewise, with a row of statistics for each of the boxes that
    `dispatch.experimental.tiling` cuts the output into (a partition of its pixels).
    """
    if a.x_scale is not None:
        raise ValueError(f"conv_fprop_stats: {_no_prologue(config)}")
    x, shape, krsc = a.x, stats.conv_shape(a), a.weight.contiguous(memory_format=torch.channels_last)
    y, boxes = empty_nhwc(x, *shape.output), tiling(shape, config).tiles
    mean, m2 = (x.new_empty((boxes, shape.k), dtype=dtype) for dtype in (torch.float64, torch.float32))
    count = x.new_empty(boxes, dtype=torch.float32)
    _module(config.kernel).run(x, krsc, None, None, None, y, (mean, m2, count), shape, False, config)
    return stats.Out(y, mean, m2, count)


def data_gradient(
    dy: Tensor,
    krsc: Tensor,
    operands: Sequence[Tensor | None],
    dx: Tensor,
    sums: Sequence[Tensor | None],
    activation: Tensor | None,
    shape: ConvShape,
    config: ConvConfig,
) -> None:
    """Launch the data gradient likewise, of the arguments of its kernel, with a row of sums for each of the boxes that
    `dispatch.experimental.gradient_tiling` cuts the image into.
    """
    dy_x, _, *others = operands
    if dy_x is not None:
        raise ValueError(f"data gradient: {_no_prologue(config)}")
    _module(config.kernel, GRADIENT).run(dy, krsc, others, dx, sums, activation, shape, config)


__all__ = ["KERNELS", "available", "conv_fprop", "conv_fprop_stats", "data_gradient", "refuse"]
