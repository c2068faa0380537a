"""Formulations on experimental Triton APIs (host tensor descriptors, Gluon): candidates for the plan, never defaults.

A Triton release can break what is in here and nothing else: importing this package never raises, `available` says what
is missing, and the caller falls back to the pointer kernel.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from resnet_fused.dispatch.conv import ConvConfig, ConvShape
from resnet_fused.dispatch.device import arch
from resnet_fused.dispatch.experimental import KERNELS, refuse_shape, tiling
from resnet_fused.kernels._launch import INTERPRETED, empty_nhwc, refuse_device

_MODULES = {
    "tma_gemm": "tma",
    "tma_conv": "tma",
    "tma_gemm_ws": "tma",
    "tma_conv_ws": "tma",
    "wgmma_conv": "wgmma",
    "tcgen05_conv": "tcgen05",
}


@functools.cache
def _module(kernel: str) -> Any:
    return importlib.import_module(f"resnet_fused.kernels.experimental.{_MODULES[kernel]}")


@functools.cache
def available(kernel: str) -> str | None:
    """Why this Triton cannot express `kernel` (one of `plan.experimental.KERNELS`), or None."""
    if kernel not in _MODULES:
        return f"no experimental kernel {kernel!r}; choose one of {', '.join(KERNELS)}"
    try:
        _module(kernel)
    except Exception as error:  # an experimental API may be missing, renamed or broken in any way
        import triton

        return f"{kernel} does not load with Triton {triton.__version__}: {type(error).__name__}: {error}"
    return None


def refuse(x: Tensor, krsc: Tensor, residual: Tensor | None, shape: ConvShape, config: ConvConfig) -> str | None:
    """Why `conv_fprop` cannot run `config` on arguments that `kernels.conv_fprop` accepts, or None."""
    reason = available(config.kernel) or refuse_device(x.device)
    if reason is not None:
        return reason
    if INTERPRETED and not config.kernel.startswith("tma"):
        return f"{config.kernel} is written in Gluon, which Triton's interpreter does not run"
    # The interpreter copies boxes on any machine.
    reason = refuse_shape(shape, x.dtype, 90 if INTERPRETED else arch(x.device), config)
    if reason is not None:
        return reason
    for name, tensor in (("x", x), ("weight", krsc), ("residual", residual)):
        if tensor is not None and tensor.data_ptr() % 16:
            return f"TMA needs tensors that start at a multiple of 16 bytes, {name} starts at {tensor.data_ptr():#x}"
    return None


def conv_fprop(
    x: Tensor,
    krsc: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    shape: ConvShape,
    relu: bool,
    config: ConvConfig,
) -> Tensor:
    """y = act(scale * conv(x, weight) + shift + residual), as `kernels.conv_fprop`, by the formulation `config.kernel`.

    Args:
        x: [N, C, H, W] in NHWC order; fp16 or bf16.
        krsc: the weight, [K, C, R, S] in NHWC order.
        scale: [K], or None for 1.
        shift: [K], or None for 0.
        residual: [N, K, P, Q] in NHWC order, the dtype of x, or None.
        shape: the problem.
        relu: whether act is ReLU, which keeps NaN; else the identity.
        config: the launch configuration; `refuse` must have returned None for it.

    Returns:
        y: [N, K, P, Q] in NHWC order, in the dtype of x.
    """
    y = empty_nhwc(x, shape.n, shape.k, shape.p, shape.q)
    nothing = (None, None, None)
    _module(config.kernel).run(x, krsc, scale, shift, residual, y, nothing, shape, relu, config)
    return y


def conv_fprop_stats(
    x: Tensor, krsc: Tensor, shape: ConvShape, config: ConvConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = round(conv(x, weight)) and the statistics of y as it was rounded, by the formulation `config.kernel`.

    Args:
        x: [N, C, H, W] in NHWC order; fp16 or bf16.
        krsc: the weight, [K, C, R, S] in NHWC order.
        shape: the problem.
        config: the launch configuration; `refuse` must have returned None for it.

    Returns:
        y: [N, K, P, Q] in NHWC order, in the dtype of x.
        mean, m2, count: [boxes, K] fp64, [boxes, K] and [boxes] fp32: of the boxes that `plan.experimental.tiling` cuts
            the output into (a partition of its pixels), as in `conv_fprop_stats`.
    """
    y, boxes = empty_nhwc(x, shape.n, shape.k, shape.p, shape.q), tiling(shape, config).tiles
    dtypes = (torch.float64, torch.float32)
    mean, m2 = (torch.empty((boxes, shape.k), dtype=dtype, device=x.device) for dtype in dtypes)
    count = torch.empty(boxes, dtype=torch.float32, device=x.device)
    _module(config.kernel).run(x, krsc, None, None, None, y, (mean, m2, count), shape, False, config)
    return y, mean, m2, count


__all__ = ["KERNELS", "available", "conv_fprop", "conv_fprop_stats", "refuse"]
