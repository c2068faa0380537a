"""Both gradients of a block's first convolution, with the sums of the batch norms that end the block before."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.dispatch.conv import ConvConfig
from resnet_fused.kernels.conv_dgrad import run
from resnet_fused.kernels.conv_wgrad import run as weight_gradient
from resnet_fused.kernels.reduce_rows import reduce_alike


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
    activation: Tensor | None,
    size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    config: ConvConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx of `conv_dgrad`, residual and all, as it is; and over dz = mask ? dx : 0 (a select) what `bn_backward_reduce`
    would find in it: sum(dz) and sum(dz * (x - mean) * invstd), the latter for `shortcut` too. With the convolution's
    input also `conv_wgrad`; what both leave in parts is added in one launch.

    Args:
        dy: as in `conv_dgrad`; so are weight, dy_x, dy_coefficients, residual and residual_mask.
        weight: see dy.
        dy_x: see dy.
        dy_coefficients: see dy.
        residual: see dy.
        residual_mask: see dy.
        x: [N, C, *size] in NHWC order: what the batch norm normalised whose sum with a shortcut, rectified, was the
            convolution's input.
        mask: bits of that ReLU, from `bn_apply`.
        mean: [C] fp32; so is invstd.
        invstd: see mean.
        shortcut: like x, what the batch norm of a projection normalised, or None; with shortcut_mean and
            shortcut_invstd, [C] fp32, or without.
        shortcut_mean: see shortcut.
        shortcut_invstd: see shortcut.
        activation: like x, the convolution's input, or None.
        size: (H, W) of the image.
        stride: as in `conv_dgrad`; so are padding, dilation, groups and config.
        padding: see stride.
        dilation: see stride.
        groups: see stride.
        config: see stride.

    Returns:
        dx: [N, C, *size] in NHWC order, in the dtype of dy.
        sum_dz, sum_dz_xhat, sum_dz_shortcut: [C] fp32, of dx as it was rounded, added in a fixed order; the last is
            empty without shortcut.
        dweight: as `conv_wgrad` gives it; empty without activation.
    """
    geometry = (stride, padding, dilation, groups)
    before = (dy_x, dy_coefficients, residual, residual_mask)
    operands = (*before, x, None, None, mean, invstd, mask, shortcut, shortcut_mean, shortcut_invstd)
    dx, *partials = run(dy, weight, operands, size, *geometry, config)
    ranges = None
    if activation is not None:
        filter_size = [*weight.shape[2:]]
        ranges = weight_gradient(dy, activation, dy_x, dy_coefficients, None, None, filter_size, *geometry, None)
    split = ranges is not None and ranges.shape[0] > 1
    sums = [*reduce_alike(*partials, other=ranges if split else None)]
    if ranges is None:
        dweight = dx.new_empty(0, dtype=torch.float32)
    else:
        dweight = (sums.pop() if split else ranges[0]).permute(0, 3, 1, 2)
    if shortcut is None:
        sums.append(dx.new_empty(0, dtype=torch.float32))
    sum_dz, sum_dz_xhat, sum_dz_shortcut = sums
    return dx, sum_dz, sum_dz_xhat, sum_dz_shortcut, dweight
