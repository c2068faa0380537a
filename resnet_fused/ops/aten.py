"""`conv_fprop` on PyTorch's own convolutions: oneDNN's fused one on a CPU, cuDNN's with a folded weight elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fold(weight: Tensor, scale: Tensor | None) -> Tensor:
    """weight * scale per output channel, in the weight's dtype and memory format."""
    if scale is None:
        return weight
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype)


def onednn_runs(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's fused convolution takes these operands."""
    if x.device.type != "cpu" or weight.device.type != "cpu" or x.dtype != weight.dtype:
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # type: ignore[attr-defined]
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _onednn_bfloat16())


@torch.compiler.assume_constant_result
def _onednn_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def conv_fprop(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
) -> Tensor:
    weight = fold(weight, scale)
    if onednn_runs(x, weight):
        # ReLU as a pass of its own: oneDNN's turns a NaN into 0, PyTorch's keeps it.
        bias = None if shift is None else shift.to(bias_dtype(x.dtype, residual is not None))
        y = onednn_conv(x, weight, bias, residual, stride, padding, dilation, groups, relu=False)
    else:
        bias = None if shift is None else shift.to(weight.dtype)
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        if residual is not None:
            y += residual
    return y.relu_() if relu else y


def onednn_pack(
    weight: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int, input_shape: torch.Size
) -> Tensor:
    """The weight in the order oneDNN prefers for inputs of this shape."""
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, list(input_shape)
    )
    return packed


def bias_dtype(dtype: torch.dtype, with_residual: bool) -> torch.dtype:
    """The most exact bias oneDNN's fused convolution takes: float32, but the data's dtype where a residual is added."""
    return dtype if with_residual else torch.float32


def onednn_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    overwrite_residual: bool = False,
) -> Tensor:
    """act(conv(x, weight) + bias + residual) in one oneDNN primitive; `weight` may be prepacked for it.

    The ReLU turns a NaN into 0. With `overwrite_residual` the result is accumulated into `residual`, one activation
    less in the caches.
    """
    conv = torch.ops.mkldnn
    shape = (padding, stride, dilation, groups)
    if residual is None:
        return conv._convolution_pointwise(x, weight, bias, *shape, "relu" if relu else "none", [], "")
    unary: tuple[str | None, list[float], str] = ("relu" if relu else None, [], "")
    if overwrite_residual:
        return conv._convolution_pointwise_.binary(residual, x, weight, bias, *shape, "add", 1.0, *unary)
    return conv._convolution_pointwise.binary(x, residual, weight, bias, *shape, "add", 1.0, *unary)
