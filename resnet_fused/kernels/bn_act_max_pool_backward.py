"""The backward of the stem's batch norm + ReLU + max pool: the gradient is gathered, never stored between the two
passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels._launch import index_type, launch
from resnet_fused.kernels._tile import (
    input_gradient,
    partials_like,
    passes_relu,
    pixel_offset,
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

# Elements of a tile by "is NHWC": with four windows to look into, more than this many spill.
TILE = {True: 1024, False: 512}


@triton.jit
def _unpooled(
    dy,
    index,
    pixel,
    channel,
    valid,
    H,
    W,
    P,
    Q,
    C,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Per pixel of x, the sum of dy over the (at most four) windows that it won."""
    image = pixel // (H * W)
    place = pixel - image * (H * W)
    h = place // W
    w = place - h * W
    gradient = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    for window in tl.static_range(4):
        p = h // 2 + window // 2
        q = w // 2 + window % 2
        r = h - 2 * p + 1  # the pixel's place in window (p, q); -1 where an even row or column has no second window
        s = w - 2 * q + 1
        covered = valid & ((r >= 0) & (s >= 0) & (p < P) & (q < Q))[:, None]
        if NHWC:
            offset = (((image * P + p) * Q + q) * C)[:, None] + channel[None, :]
        else:
            offset = (image * C * (P * Q) + p * Q + q)[:, None] + (channel.to(INDEX) * (P * Q))[None, :]
        won = tl.load(index + offset, mask=covered, other=255).to(tl.int32) == (3 * r + s).to(tl.int32)[:, None]
        gradient += tl.where(won & covered, to_fp32(tl.load(dy + offset, mask=covered, other=0.0)), 0.0)
    return gradient


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
    pixels,  # N * H * W
    span,
    UNIT: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """sum(dz) and sum(dz * xhat); a program owns one range of x's pixels and one tile of channels."""
    C = channel_units * UNIT
    row, first, end, channel, channel_offset = reduction_tile(C, H * W, pixels, span, NHWC, INDEX, BLOCK_CHANNELS)
    exists = channel < C
    channel_scale = tl.load(scale + channel, mask=exists, other=0.0)[None, :]
    channel_shift = tl.load(shift + channel, mask=exists, other=0.0)[None, :]
    channel_mean = tl.load(mean + channel, mask=exists, other=0.0)[None, :]
    total = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    total_x = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, span, BLOCK_PIXELS):
        pixel = first + start + tl.arange(0, BLOCK_PIXELS)
        valid = (pixel < end)[:, None] & exists[None, :]
        offset = pixel_offset(pixel, C, H * W, NHWC)[:, None] + channel_offset[None, :]
        value = tl.load(x + offset, mask=valid, other=0.0)
        dz = _unpooled(dy, index, pixel, channel, valid, H, W, P, Q, C, NHWC, INDEX, BLOCK_PIXELS, BLOCK_CHANNELS)
        dz = tl.where(passes_relu(value, channel_scale, channel_shift), dz, 0.0)
        total += dz
        total_x = tl.fma(dz, tl.where(valid, to_fp32(value) - channel_mean, 0.0), total_x)
    out = row * C + channel
    tl.store(sum_dy + out, sum_lanes(total), mask=exists)
    tl.store(sum_dy_xhat + out, sum_lanes(total_x) * tl.load(invstd + channel, mask=exists, other=0.0), mask=exists)


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
    pixels,  # N * H * W
    UNIT: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """dx = scale * (dz - sum_dy / count - xhat * sum_dy_xhat / count); a program owns a tile of x."""
    C = channel_units * UNIT
    _, first, end, channel, channel_offset = reduction_tile(C, H * W, pixels, BLOCK_PIXELS, NHWC, INDEX, BLOCK_CHANNELS)
    exists = channel < C
    pixel = first + tl.arange(0, BLOCK_PIXELS)
    valid = (pixel < end)[:, None] & exists[None, :]
    offset = pixel_offset(pixel, C, H * W, NHWC)[:, None] + channel_offset[None, :]
    value = tl.load(x + offset, mask=valid, other=0.0)
    channel_scale = tl.load(scale + channel, mask=exists, other=0.0)[None, :]
    channel_shift = tl.load(shift + channel, mask=exists, other=0.0)[None, :]
    dz = _unpooled(dy, index, pixel, channel, valid, H, W, P, Q, C, NHWC, INDEX, BLOCK_PIXELS, BLOCK_CHANNELS)
    dz = tl.where(passes_relu(value, channel_scale, channel_shift), dz, 0.0)
    if sum_dy is not None:
        channel_mean = tl.load(mean + channel, mask=exists, other=0.0)[None, :]
        channel_invstd = tl.load(invstd + channel, mask=exists, other=0.0)[None, :]
        mean_dy = (tl.load(sum_dy + channel, mask=exists, other=0.0) / count)[None, :]
        mean_dy_xhat = (tl.load(sum_dy_xhat + channel, mask=exists, other=0.0) / count)[None, :]
        gradient = input_gradient(dz, value, channel_scale, channel_mean, channel_invstd, mean_dy, mean_dy_xhat)
    else:
        gradient = channel_scale * dz
    tl.store(dx + offset, round_to(gradient, dx.dtype.element_ty), mask=valid)


def bn_act_max_pool_backward_reduce(a: first.Args) -> first.Out:
    """Launch `ops.bn_act_max_pool_backward_reduce`."""
    view = reduction_of(a.x, a.rows, TILE[is_nhwc(a.x)])
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
        BLOCK_PIXELS=view.block_pixels,
        BLOCK_CHANNELS=view.block_channels,
    )
    return first.Out(*reduce_alike(*partials))


def bn_act_max_pool_backward_apply(a: second.Args) -> Tensor:
    """Launch `ops.bn_act_max_pool_backward_apply`."""
    view = reduction_of(a.x, 1, TILE[is_nhwc(a.x)])
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
        BLOCK_PIXELS=view.block_pixels,
        BLOCK_CHANNELS=view.block_channels,
    )
    return dx
