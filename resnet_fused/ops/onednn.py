"""oneDNN's fused convolution on a CPU, through the ops that Inductor calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused._compiling import constant
from resnet_fused.ops.activations import ACTIVATIONS, activate


def runs(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's fused convolution takes these operands."""
    if x.device.type != "cpu" or weight.device.type != "cpu" or x.dtype != weight.dtype:
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # type: ignore[attr-defined]
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _multiplies_bfloat16())


@constant
def _multiplies_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_shape: torch.Size,
) -> Tensor:
    """The weight in the order oneDNN prefers for inputs of this shape."""
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, list(input_shape)
    )
    return packed


def bias_dtype(dtype: torch.dtype, with_residual: bool) -> torch.dtype:
    """The most exact bias oneDNN's fused convolution takes: float32, but the data's dtype where a residual is added."""
    return dtype if with_residual else torch.float32


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
    overwrite_residual: bool = False,
) -> Tensor:
    """act(conv(x, weight) + bias + residual) in one oneDNN primitive; `weight` may be prepacked for it.

    The ReLU turns a NaN into 0. With `overwrite_residual` the result is accumulated into `residual`,
    one activation less in the caches.
    """
    ops = torch.ops.mkldnn
    shape = (padding, stride, dilation, groups)
    if residual is not None and act not in (None, "relu"):  # oneDNN's op for a sum knows no other
        y = conv(x, weight, bias, residual, stride, padding, dilation, groups, None, overwrite_residual)
        return activate(y, act, inplace=True)
    attribute = None if act is None else ACTIVATIONS[act].onednn
    if residual is None:
        return ops._convolution_pointwise(x, weight, bias, *shape, attribute or "none", [], "")
    unary: tuple[str | None, list[float], str] = (attribute, [], "")
    # Out of place, torch 2.11 fails where the result is NCHW and NHWC at once and the weight is prepacked.
    if not overwrite_residual and (residual.shape[1] == 1 or tuple(residual.shape[2:]) == (1, 1)):
        residual, overwrite_residual = residual.clone(), True
    if overwrite_residual:
        return ops._convolution_pointwise_.binary(residual, x, weight, bias, *shape, "add", 1.0, *unary)
    return ops._convolution_pointwise.binary(x, residual, weight, bias, *shape, "add", 1.0, *unary)
