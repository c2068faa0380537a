"""The convolution ops on PyTorch's own convolutions, with passes of their own for what those do not fuse.

`conv_fprop` is oneDNN's fused convolution on a CPU, cuDNN's with a folded weight elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from resnet_fused._compiling import constant
from resnet_fused.ops import reference
from resnet_fused.ops.arithmetic import compute_dtype, rounded, unpack_bits


def fold(weight: Tensor, scale: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """weight * scale per output channel, rounded once to `dtype` (None: the weight's), in its memory format."""
    if scale is not None:
        weight, dtype = weight * scale.view(-1, 1, 1, 1), dtype or weight.dtype
    return weight if dtype is None else weight.to(dtype)


def onednn_runs(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's fused convolution takes these operands."""
    if x.device.type != "cpu" or weight.device.type != "cpu" or x.dtype != weight.dtype:
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):  # type: ignore[attr-defined]
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _onednn_bfloat16())


@constant
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
        # Contiguous, because oneDNN's reads a bias without its stride.
        bias = None if shift is None else shift.to(bias_dtype(x.dtype, residual is not None)).contiguous()
        y = onednn_conv(x, weight, bias, residual, stride, padding, dilation, groups, relu=False)
    else:
        bias = None if shift is None else shift.to(weight.dtype)
        y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        if residual is not None:
            y += residual
    return y.relu_() if relu else y


def _activation(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """round(relu(x*scale + shift)); x itself without an affine map."""
    if scale is None or shift is None:
        return x
    return _affine(x, scale, shift).relu_().to(x.dtype)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x*scale + shift in the compute dtype."""
    return torch.addcmul(shift.view(-1, 1, 1), x.to(compute_dtype(x.dtype)), scale.view(-1, 1, 1))


def _gradient(dy: Tensor, x: Tensor | None, coefficients: Tensor | None) -> Tensor:
    """round(a*dy + b*x + c); dy itself without coefficients."""
    if x is None or coefficients is None:
        return dy
    a, b, c = coefficients
    return _affine(x, b, c).addcmul_(dy.to(a.dtype), a.view(-1, 1, 1)).to(dy.dtype)


def conv_fprop_stats(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = F.conv2d(_activation(x, x_scale, x_shift), weight, None, stride, padding, dilation, groups)
    return (y, *reference.bn_stats(y, rows))


def conv_dgrad(
    dy: Tensor,
    weight: Tensor,
    dy_x: Tensor | None,
    dy_coefficients: Tensor | None,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = [dy.shape[0], weight.shape[1] * groups, *size]
    gradient = _gradient(dy, dy_x, dy_coefficients)
    dx = conv2d_input(shape, weight, gradient, stride, padding, dilation, groups)
    if residual is not None:
        dx += residual if residual_mask is None else torch.where(unpack_bits(residual_mask, residual), residual, 0)
    if x is None or scale is None or shift is None or mean is None or invstd is None:
        none = dy.new_empty(0, dtype=compute_dtype(dy.dtype))
        return rounded(dx, dy), none, none.clone()
    dx = rounded(torch.where(_affine(x, scale, shift).to(x.dtype) <= 0, 0, dx), dy)
    up = dx.to(mean.dtype)
    return dx, up.sum((0, 2, 3)), (up * _normalised(x, mean, invstd)).sum((0, 2, 3))


def conv_dgrad_join(
    dy: Tensor,
    weight: Tensor,
    dy_x: Tensor | None,
    dy_coefficients: Tensor | None,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    x: Tensor,
    mask: Tensor,
    mean: Tensor,
    invstd: Tensor,
    shortcut: Tensor | None,
    shortcut_mean: Tensor | None,
    shortcut_invstd: Tensor | None,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    before = (dy, weight, dy_x, dy_coefficients, residual, residual_mask)
    dx = conv_dgrad(*before, None, None, None, None, None, size, stride, padding, dilation, groups)[0]
    dz = torch.where(unpack_bits(mask, x), dx, 0).to(mean.dtype)
    sums = dz.sum((0, 2, 3)), (dz * _normalised(x, mean, invstd)).sum((0, 2, 3))
    if shortcut is None or shortcut_mean is None or shortcut_invstd is None:
        return (dx, *sums, mean.new_empty(0))
    return (dx, *sums, (dz * _normalised(shortcut, shortcut_mean, shortcut_invstd)).sum((0, 2, 3)))


def _normalised(x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    return (x - mean.view(-1, 1, 1)) * invstd.view(-1, 1, 1)


def conv_wgrad(
    dy: Tensor,
    x: Tensor,
    dy_x: Tensor | None,
    dy_coefficients: Tensor | None,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    filter: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    shape = [dy.shape[1], x.shape[1] // groups, *filter]
    a, g = _activation(x, x_scale, x_shift), _gradient(dy, dy_x, dy_coefficients)
    dweight = conv2d_weight(a, shape, g, stride, padding, dilation, groups)
    return dweight.to(compute_dtype(x.dtype)).contiguous(memory_format=torch.channels_last)


def bn_backward_finalize(
    sum_dy: Tensor, sum_dy_xhat: Tensor, scale: Tensor, mean: Tensor, invstd: Tensor, count: float
) -> Tensor:
    return reference.bn_backward_finalize(sum_dy, sum_dy_xhat, scale, mean, invstd, count)  # type: ignore[no-any-return]


def conv_chain(
    x: Tensor,
    weight2: Tensor,
    scale2: Tensor | None,
    shift2: Tensor,
    weight3: Tensor,
    scale3: Tensor | None,
    shift3: Tensor,
    residual: Tensor,
    weight1: Tensor | None,
    scale1: Tensor | None,
    shift1: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    fprop: Callable[..., Tensor] = conv_fprop,
) -> tuple[Tensor, Tensor]:
    one, zero = [1, 1], [0, 0]
    a = fprop(x, weight2, scale2, shift2, None, stride, padding, dilation, 1, True)
    y = fprop(a, weight3, scale3, shift3, residual, one, zero, one, 1, True)
    if weight1 is None:
        return y, x.new_empty(0)
    return y, fprop(y, weight1, scale1, shift1, None, one, zero, one, 1, True)


def conv_join(
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor,
    shortcut_weight: Tensor,
    shift: Tensor,
    shortcut_stride: list[int],
    relu: bool,
    fprop: Callable[..., Tensor] = conv_fprop,
) -> Tensor:
    one, zero = [1, 1], [0, 0]
    residual = fprop(shortcut, shortcut_weight, None, None, None, shortcut_stride, zero, one, 1, False)
    return fprop(x, weight, None, shift, residual, one, zero, one, 1, relu)


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
    # Out of place, torch 2.11 fails where the result is NCHW and NHWC at once and the weight is prepacked.
    if not overwrite_residual and (residual.shape[1] == 1 or tuple(residual.shape[2:]) == (1, 1)):
        residual, overwrite_residual = residual.clone(), True
    if overwrite_residual:
        return conv._convolution_pointwise_.binary(residual, x, weight, bias, *shape, "add", 1.0, *unary)
    return conv._convolution_pointwise.binary(x, residual, weight, bias, *shape, "add", 1.0, *unary)
