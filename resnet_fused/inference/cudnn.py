"""act(conv(x, weight) + bias + residual) in one call of cuDNN: the op that PyTorch exposes, or a graph of cuDNN's own.

PyTorch documents neither which operands its fused convolutions take nor what becomes of a NaN; the one without a
residual hands cuDNN its uninitialised result with a factor of 0. So each way is tried once on operands of its kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused.contract import floor
from resnet_fused.dispatch.conv import uses_tf32
from resnet_fused.functional.common import Geometry
from resnet_fused.ops import conv_fprop, cudnn_graphs
from resnet_fused.ops.refusals import first_line

BACKENDS = ("aten", "cudnn")  # those that have such a call, and nothing that spans convolutions
TF32_EPS = 2.0**-10
SLACK = 4.0  # of what two right results may differ by: native rounds the sum three times, cuDNN once


def runs(backend: str, x: Tensor, act: str | None) -> bool:
    """Whether there is such a call for this activation: `"aten"` has that of PyTorch, `"cudnn"` graphs."""
    if not x.is_cuda or torch.version.hip is not None or x.dtype == torch.float64:
        return False
    cudnn = torch.backends.cudnn
    if not (cudnn.is_available() and cudnn.enabled):
        return False
    if backend == "cudnn":
        return act in cudnn_graphs.ACTS and cudnn_graphs.unavailable("cuda") is None
    return act == "relu" and not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled())


def name(backend: str, residual: object) -> str:
    """Of the op."""
    if backend == "cudnn":
        return "conv_fprop"
    return "cudnn_convolution_relu" if residual is None else "cudnn_convolution_add_relu"


def conv(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    geometry: Geometry,
    act: str | None,
) -> Tensor:
    """act(conv(x, weight) + bias + residual), rounded once.

    Args:
        backend: `"aten"` or `"cudnn"`.
        x: [N, C, H, W] on a GPU; fp32, fp16 or bf16, as all others.
        weight: [K, C/groups, R, S].
        bias: [K].
        residual: [N, K, P, Q] or None.
        geometry: stride, padding, dilation, groups.
        act: one for which `runs`.
    """
    if backend == "cudnn":
        return cudnn_graphs.conv_fprop(x, weight, None, bias, residual, *geometry, act)
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


def refusal(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shape: Sequence[int],
    residual: Tensor | None,
    geometry: Geometry,
    act: str | None,
) -> str | None:
    """Why it is not to run on operands like these, or None: it was tried, and native PyTorch gives the same.

    Args:
        x, residual: read for their shapes, strides and dtypes alone.
        shape: of the result.
    """
    op = name(backend, residual)
    x, residual = _random(x), None if residual is None else _random(residual)
    x[0, 0, 0, 0] = torch.nan
    expected = conv_fprop.native(conv_fprop.Args(x, weight, None, bias, residual, *geometry, act=act))
    try:
        for _ in range(4):  # what the allocator gives the result next, if cuDNN reads it, is not zero
            torch.full(tuple(shape), torch.nan, dtype=x.dtype, device=x.device)
        actual = conv(backend, x, weight, bias, residual, geometry, act)
    except RuntimeError as error:
        return f"{op}: {first_line(error)}"
    if actual.shape != expected.shape or actual.stride() != expected.stride():
        return f"{op} gives {list(actual.shape)} in another memory order"
    if not torch.equal(actual.isnan(), expected.isnan()):
        return f"{op} does not keep NaN where PyTorch keeps it"
    a, e = (t.nan_to_num(0.0).double() for t in (actual, expected))
    eps = floor(x.dtype, weight[0].numel())
    eps = max(eps, TF32_EPS) if uses_tf32(x.dtype) else eps
    if (a - e).norm() > SLACK * eps * e.norm():
        return f"{op} gives other values than PyTorch's convolution"
    return None


def _random(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).normal_()
