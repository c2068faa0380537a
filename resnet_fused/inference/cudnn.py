"""relu(conv(x, weight) + bias + residual) in one call of cuDNN, as PyTorch exposes it.

PyTorch documents neither which operands its fused convolutions take nor what becomes of a NaN; the one without a
residual hands cuDNN its uninitialised result with a factor of 0. So each is tried once on operands of its kind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused.contract import floor
from resnet_fused.dispatch.conv import uses_tf32
from resnet_fused.functional.common import Geometry
from resnet_fused.ops import conv_fprop

TF32_EPS = 2.0**-10
SLACK = 4.0  # of what two right results may differ by: native rounds the sum three times, cuDNN once


def available(x: Tensor) -> bool:
    """Whether PyTorch would run cuDNN's fused convolution of this activation: it has no deterministic one."""
    if not x.is_cuda or torch.version.hip is not None or x.dtype == torch.float64:
        return False
    cudnn = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    return cudnn.is_available() and cudnn.enabled and not deterministic


def name(residual: object) -> str:
    """Of the op that PyTorch has for it."""
    return "cudnn_convolution_relu" if residual is None else "cudnn_convolution_add_relu"


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, geometry: Geometry) -> Tensor:
    """relu(conv(x, weight) + bias + residual), rounded once.

    Args:
        x: [N, C, H, W] on a GPU; fp32, fp16 or bf16, as all others.
        weight: [K, C/groups, R, S].
        bias: [K].
        residual: [N, K, P, Q] or None.
        geometry: stride, padding, dilation, groups.
    """
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


def refusal(
    x: Tensor, weight: Tensor, bias: Tensor, shape: Sequence[int], residual: Tensor | None, geometry: Geometry
) -> str | None:
    """Why it is not to run on operands like these, or None: it was tried, and native PyTorch gives the same.

    Args:
        x, residual: read for their shapes, strides and dtypes alone.
        shape: of the result.
    """
    x, residual = _random(x), None if residual is None else _random(residual)
    x[0, 0, 0, 0] = torch.nan
    expected = conv_fprop.native(conv_fprop.Args(x, weight, None, bias, residual, *geometry, act="relu"))
    try:
        for _ in range(4):  # what the allocator gives the result next, if cuDNN reads it, is not zero
            torch.full(tuple(shape), torch.nan, dtype=x.dtype, device=x.device)
        actual = conv_relu(x, weight, bias, residual, geometry)
    except RuntimeError as error:
        return f"{name(residual)}: {str(error).strip().splitlines()[0]}"
    if actual.shape != expected.shape or actual.stride() != expected.stride():
        return f"{name(residual)} gives {list(actual.shape)} in another memory order"
    if not torch.equal(actual.isnan(), expected.isnan()):
        return f"{name(residual)} does not keep NaN where PyTorch keeps it"
    a, e = (t.nan_to_num(0.0).double() for t in (actual, expected))
    eps = floor(x.dtype, weight[0].numel())
    eps = max(eps, TF32_EPS) if uses_tf32(x.dtype) else eps
    if (a - e).norm() > SLACK * eps * e.norm():
        return f"{name(residual)} gives other values than PyTorch's convolution"
    return None


def _random(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).normal_()
