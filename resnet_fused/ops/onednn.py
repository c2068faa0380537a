"""oneDNN's fused convolutions on a CPU, in float and in int8, through the ops that Inductor calls."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused._compiling import constant
from resnet_fused.ops.activations import ACTIVATIONS, activate
from resnet_fused.ops.refusals import first_line


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


class Grid(NamedTuple):
    """The values that 8 bits stand for: scale * (q - zero_point)."""

    scale: float
    zero_point: int


def quantise(x: Tensor, grid: Grid) -> Tensor:
    """The nearest points of the grid, uint8; what lies beyond its ends becomes them.

    `quantized_decomposed.quantize_per_tensor`, but in place: two passes over memory less.
    """
    y = x.float().mul(1.0 / grid.scale)
    return y.round_().add_(grid.zero_point).clamp_(0, 255).to(torch.uint8)


def int8_refusal() -> str | None:
    """Why oneDNN's int8 convolution is not to be used on this machine; None if it is."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # type: ignore[attr-defined]
        return "this PyTorch has no oneDNN, or torch.backends.mkldnn is switched off"
    return _int8_problem()


@constant
@functools.cache
def _int8_problem() -> str | None:
    """Tries the largest products: without VNNI, pairs of them saturate in 16 bits."""
    channels, one, pointwise = 64, Grid(1.0, 0), ([1, 1], [0, 0], [1, 1], 1)
    x = torch.full((1, channels, 4, 4), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    weight = torch.full((channels, channels, 1, 1), 127, dtype=torch.int8)
    scale = torch.ones(channels)
    try:
        packed = int8_pack(weight, scale, one, *pointwise, x.shape)
        y = int8_conv(x, one, packed, scale, torch.zeros(channels), None, None, *pointwise, None, torch.float32)
    except (RuntimeError, AttributeError) as error:  # no such op, or no kernel behind it
        return f"oneDNN has no int8 convolution here: {first_line(error)}"
    if bool((y != 255 * 127 * channels).any()):
        return "its int8 products saturate on this CPU: it has no VNNI, or ONEDNN_MAX_CPU_ISA leaves it unused"
    return None


@constant
def _symmetric() -> Tensor:
    """The weights' zero points, which the op takes and does not read."""
    return _zero()


@functools.cache
def _zero() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


def int8_pack(
    weight: Tensor,
    weight_scale: Tensor,
    x_grid: Grid,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_shape: torch.Size,
) -> Tensor:
    """An int8 weight [K, C/groups, R, S] in the order oneDNN prefers for inputs of this shape and grid."""
    packed: Tensor = torch.ops.onednn.qconv_prepack(
        weight, weight_scale, *x_grid, stride, padding, dilation, groups, list(input_shape)
    )
    return packed


def int8_conv(
    x: Tensor,
    x_grid: Grid,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    residual_grid: Grid | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str | None,
    result: Grid | torch.dtype,
) -> Tensor:
    """act(conv(x, weight) + bias + residual) in one oneDNN primitive: int32 sums, an fp32 epilogue, one rounding.

    Args:
        x: uint8, NHWC, on `x_grid`.
        weight: of `int8_pack`, times `weight_scale` per output channel; `bias` is float32.
        residual: uint8 on `residual_grid`, with room for the result, or None: it is overwritten.
        result: the grid of a uint8 result, or the dtype of a float one, which no residual is added to.
        act: with a residual ReLU or None, as oneDNN has it.
    """
    (scale, zero_point), dtype = (result, torch.uint8) if isinstance(result, Grid) else (Grid(1.0, 0), result)
    weights = (weight, weight_scale, _symmetric())
    if act == "relu" and result == Grid(scale, 0):
        act = None  # nothing below 0 is on the grid: rounding to it is a ReLU, and no work
    shape, attribute = (stride, padding, dilation, groups), "none" if act is None else ACTIVATIONS[act].onednn
    conv = torch.ops.onednn.qconv2d_pointwise
    if residual is None:
        return conv(x, *x_grid, *weights, bias, *shape, scale, zero_point, dtype, attribute, [], "")
    assert residual_grid is not None
    added: tuple[object, ...] = (*residual_grid, "sum", 1.0, attribute, [], "")
    return conv.binary(x, *x_grid, *weights, residual, bias, *shape, scale, zero_point, dtype, *added)
