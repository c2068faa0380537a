"""The backward of the stem's batch norm + ReLU + max pool: the gradient is gathered, never stored between the two
passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.dispatch.conv import MAX_REGISTERS
from resnet_fused.kernels._launch import index_type, launch
from resnet_fused.kernels._tile import (
    input_gradient,
    partials_like,
    passes_relu,
    reduction_of,
    reduction_tile,
    round_to,
    sum_lanes,
    to_fp32,
)
from resnet_fused.kernels.reduce_rows import reduce_alike
from resnet_fused.ops import bn_act_max_pool_backward_apply as second
from resnet_fused.ops import bn_act_max_pool_backward_reduce as first
from resnet_fused.ops.arithmetic import is_nhwc

# Elements of a tile of windows by "is NHWC"; larger ones spill.
TILE = {True: 1024, False: 512}


@triton.jit
def _windows(
    dy,
    index,
    window,
    channel,
    exists,
    P,
    Q,
    C,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The gradients and the winners of a window (p, q) and of its neighbours (p, q + 1), (p + 1, q), (p + 1, q + 1),
    and (image, p, q); no winner where there is no neighbour.

    Of the pixels of x, (2p, 2q) is in the first of them alone, (2p, 2q + 1) in two, (2p + 1, 2q) in two, and
    (2p + 1, 2q + 1) in all four: so every pixel's windows are read once, and not four times.
    """
    image = window // (P * Q)
    place = window - image * (P * Q)
    p = place // Q
    q = place - p * Q
    if NHWC:
        offset = (window * C)[:, None] + channel[None, :]
        right = C
    else:
        offset = (image * C * (P * Q) + place)[:, None] + (channel.to(INDEX) * (P * Q))[None, :]
        right = 1
    below = Q * right
    valid_right = exists & (q + 1 < Q)[:, None]
    valid_below = exists & (p + 1 < P)[:, None]
    valid_both = valid_right & valid_below
    gradients = (
        to_fp32(tl.load(dy + offset, mask=exists, other=0.0)),
        to_fp32(tl.load(dy + offset + right, mask=valid_right, other=0.0)),
        to_fp32(tl.load(dy + offset + below, mask=valid_below, other=0.0)),
        to_fp32(tl.load(dy + offset + below + right, mask=valid_both, other=0.0)),
    )
    winners = (
        tl.load(index + offset, mask=exists, other=255),
        tl.load(index + offset + right, mask=valid_right, other=255),
        tl.load(index + offset + below, mask=valid_below, other=255),
        tl.load(index + offset + below + right, mask=valid_both, other=255),
    )
    return gradients, winners, image, p, q


@triton.jit
def _unpooled(gradients, winners, DOWN: tl.constexpr, RIGHT: tl.constexpr):
    """The sum of dy over the windows that pixel (2p + DOWN, 2q + RIGHT) won: a window's place 3 * r + s of it."""
    total = tl.where(winners[0] == 3 * (1 + DOWN) + 1 + RIGHT, gradients[0], 0.0)
    if RIGHT == 1:
        total += tl.where(winners[1] == 3 * (1 + DOWN), gradients[1], 0.0)
    if DOWN == 1:
        total += tl.where(winners[2] == 1 + RIGHT, gradients[2], 0.0)
        if RIGHT == 1:
            total += tl.where(winners[3] == 0, gradients[3], 0.0)
    return total


@triton.jit
def _pixel(image, p, q, channel, exists, H, W, C, DOWN: tl.constexpr, RIGHT: tl.constexpr, NHWC, INDEX):
    """Offsets of pixel (2p + DOWN, 2q + RIGHT) of x, and which exist."""
    h = 2 * p + DOWN
    w = 2 * q + RIGHT
    valid = exists & ((h < H) & (w < W))[:, None]
    if NHWC:
        return (((image * H + h) * W + w) * C)[:, None] + channel[None, :], valid
    else:
        return (image * C * (H * W) + h * W + w)[:, None] + (channel.to(INDEX) * (H * W))[None, :], valid


@triton.jit
def _bn_act_max_pool_backward_reduce_kernel(
    dy,  # [N, C, P, Q], in the order of x; so is index
    index,
    x,  # [N, C, H, W], NHWC or NCHW
    scale,  # [C]; so are shift, mean, invstd
    shift,
    mean,
    invstd,
    sum_dy,  # [rows, C]
    sum_dy_xhat,  # [rows, C]
    H,
    W,
    P,
    Q,
    channel_units,  # C / UNIT
    windows,  # N * P * Q
    span,
    UNIT: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_WINDOWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """sum(dz) and sum(dz * xhat); a program owns one range of windows, with the four pixels of x that begin at each,
    and one tile of channels.
    """
    C = channel_units * UNIT
    row, first, end, channel, _ = reduction_tile(C, P * Q, windows, span, NHWC, INDEX, BLOCK_CHANNELS)
    channel_exists = channel < C
    channel_scale = tl.load(scale + channel, mask=channel_exists, other=0.0)[None, :]
    channel_shift = tl.load(shift + channel, mask=channel_exists, other=0.0)[None, :]
    channel_mean = tl.load(mean + channel, mask=channel_exists, other=0.0)[None, :]
    total = tl.zeros((BLOCK_WINDOWS, BLOCK_CHANNELS), tl.float32)
    total_x = tl.zeros((BLOCK_WINDOWS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, span, BLOCK_WINDOWS):
        window = first + start + tl.arange(0, BLOCK_WINDOWS)
        exists = (window < end)[:, None] & channel_exists[None, :]
        gradients, winners, image, p, q = _windows(dy, index, window, channel, exists, P, Q, C, NHWC, INDEX)
        for pixel in tl.static_range(4):
            place, valid = _pixel(image, p, q, channel, exists, H, W, C, pixel // 2, pixel % 2, NHWC, INDEX)
            value = tl.load(x + place, mask=valid, other=0.0)
            dz = _unpooled(gradients, winners, pixel // 2, pixel % 2)
            dz = tl.where(valid & passes_relu(value, channel_scale, channel_shift), dz, 0.0)
            total += dz
            total_x = tl.fma(dz, tl.where(valid, to_fp32(value) - channel_mean, 0.0), total_x)
    out = row * C + channel
    tl.store(sum_dy + out, sum_lanes(total), mask=channel_exists)
    channel_invstd = tl.load(invstd + channel, mask=channel_exists, other=0.0)
    tl.store(sum_dy_xhat + out, sum_lanes(total_x) * channel_invstd, mask=channel_exists)


@triton.jit
def _bn_act_max_pool_backward_apply_kernel(
    dy,  # [N, C, P, Q], in the order of x; so is index
    index,
    x,  # [N, C, H, W], NHWC or NCHW
    scale,  # [C]; so are shift, mean, invstd
    shift,
    mean,
    invstd,
    sum_dy,  # [C], or None: the statistics were constants
    sum_dy_xhat,
    count,
    dx,  # like x
    H,
    W,
    P,
    Q,
    channel_units,  # C / UNIT
    windows,  # N * P * Q
    UNIT: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_WINDOWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """dx = scale * (dz - sum_dy / count - xhat * sum_dy_xhat / count); a program owns a tile of windows, with the four
    pixels of x that begin at each.
    """
    C = channel_units * UNIT
    _, first, end, channel, _ = reduction_tile(C, P * Q, windows, BLOCK_WINDOWS, NHWC, INDEX, BLOCK_CHANNELS)
    channel_exists = channel < C
    channel_scale = tl.load(scale + channel, mask=channel_exists, other=0.0)[None, :]
    channel_shift = tl.load(shift + channel, mask=channel_exists, other=0.0)[None, :]
    if sum_dy is not None:
        channel_mean = tl.load(mean + channel, mask=channel_exists, other=0.0)[None, :]
        channel_invstd = tl.load(invstd + channel, mask=channel_exists, other=0.0)[None, :]
        mean_dy = (tl.load(sum_dy + channel, mask=channel_exists, other=0.0) / count)[None, :]
        mean_dy_xhat = (tl.load(sum_dy_xhat + channel, mask=channel_exists, other=0.0) / count)[None, :]
    window = first + tl.arange(0, BLOCK_WINDOWS)
    exists = (window < end)[:, None] & channel_exists[None, :]
    gradients, winners, image, p, q = _windows(dy, index, window, channel, exists, P, Q, C, NHWC, INDEX)
    for pixel in tl.static_range(4):
        place, valid = _pixel(image, p, q, channel, exists, H, W, C, pixel // 2, pixel % 2, NHWC, INDEX)
        value = tl.load(x + place, mask=valid, other=0.0)
        dz = _unpooled(gradients, winners, pixel // 2, pixel % 2)
        dz = tl.where(passes_relu(value, channel_scale, channel_shift), dz, 0.0)
        if sum_dy is not None:
            gradient = input_gradient(dz, value, channel_scale, channel_mean, channel_invstd, mean_dy, mean_dy_xhat)
        else:
            gradient = channel_scale * dz
        tl.store(dx + place, round_to(gradient, dx.dtype.element_ty), mask=valid)


def bn_act_max_pool_backward_reduce(a: first.Args) -> first.Out:
    """Launch `ops.bn_act_max_pool_backward_reduce`."""
    nhwc = is_nhwc(a.x)
    view = reduction_of(a.dy, a.rows, TILE[nhwc], nhwc)
    partials = partials_like(a.x, a.rows)
    launch(
        _bn_act_max_pool_backward_reduce_kernel,
        view.grid,
        a.dy,
        a.index,
        a.x,
        a.scale,
        a.shift,
        a.mean,
        a.invstd,
        *partials,
        *a.x.shape[2:],
        *a.dy.shape[2:],
        view.channels // view.unit,
        view.pixels,
        view.span,
        UNIT=view.unit,
        NHWC=view.nhwc,
        INDEX=index_type(a.x.numel(), partials[0].numel()),
        BLOCK_WINDOWS=view.block_pixels,
        BLOCK_CHANNELS=view.block_channels,
        maxnreg=MAX_REGISTERS,
    )
    return first.Out(*reduce_alike(*partials))


def bn_act_max_pool_backward_apply(a: second.Args) -> Tensor:
    """Launch `ops.bn_act_max_pool_backward_apply`."""
    nhwc = is_nhwc(a.x)
    view = reduction_of(a.dy, 1, TILE[nhwc], nhwc)
    dx = torch.empty_like(a.x)
    launch(
        _bn_act_max_pool_backward_apply_kernel,
        triton.cdiv(view.pixels, view.block_pixels) * triton.cdiv(view.channels, view.block_channels),
        a.dy,
        a.index,
        a.x,
        a.scale,
        a.shift,
        a.mean,
        a.invstd,
        a.sum_dy,
        a.sum_dy_xhat,
        float(a.count),
        dx,
        *a.x.shape[2:],
        *a.dy.shape[2:],
        view.channels // view.unit,
        view.pixels,
        UNIT=view.unit,
        NHWC=view.nhwc,
        INDEX=index_type(a.x.numel()),
        BLOCK_WINDOWS=view.block_pixels,
        BLOCK_CHANNELS=view.block_channels,
        maxnreg=MAX_REGISTERS,
    )
    return dx
