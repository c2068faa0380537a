"""The stem's batch norm + ReLU + 3x3/2 max pool in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resnet_fused.kernels._launch import index_type, launch
from resnet_fused.kernels._tile import affine, is_nan, reduction_of, relu, round_to, to_fp32
from resnet_fused.ops.arithmetic import is_nhwc
from resnet_fused.ops.bn_act_max_pool import Args, Out, pooled_size

# Elements of a tile by "is NHWC". In NCHW order neighbours in a thread share no address, and more than this many spill.
TILE = {True: 2048, False: 512}


@triton.jit
def _bn_act_max_pool_kernel(
    x,  # [N, C, H, W], NHWC or NCHW
    scale,  # [C]
    shift,  # [C]
    y,  # [N, C, P, Q], in the order of x
    index,  # uint8, like y
    H,
    W,
    P,
    Q,
    channel_units,  # C / UNIT
    pixels,  # N * P * Q
    UNIT: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """y = max over the window of round(relu(x * scale + shift)), index = the winner's place 3 * r + s; a program owns a
    tile of y.

    PyTorch's rule for the winner: the first of equals, but a NaN replaces whatever came before it.
    """
    C = channel_units * UNIT
    tiles = tl.cdiv(C, BLOCK_CHANNELS)
    pid = tl.program_id(0)
    pixel = (pid // tiles).to(INDEX) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = (pid % tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    image = pixel // (P * Q)
    place = pixel - image * (P * Q)
    p = place // Q
    q = place - p * Q
    exists = (pixel < pixels)[:, None] & (channel < C)[None, :]
    channel_scale = tl.load(scale + channel, mask=channel < C, other=0.0)[None, :]
    channel_shift = tl.load(shift + channel, mask=channel < C, other=0.0)[None, :]

    best = tl.full((BLOCK_PIXELS, BLOCK_CHANNELS), float("-inf"), tl.float32)
    winner = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.int32)
    for tap in tl.static_range(9):
        h = 2 * p - 1 + tap // 3
        w = 2 * q - 1 + tap % 3
        inside = exists & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
        if NHWC:
            offset = (((image * H + h) * W + w) * C)[:, None] + channel[None, :]
        else:
            offset = (image * C * (H * W) + h * W + w)[:, None] + (channel.to(INDEX) * (H * W))[None, :]
        value = relu(affine(tl.load(x + offset, mask=inside, other=0.0), channel_scale, channel_shift))
        value = to_fp32(round_to(value, y.dtype.element_ty))
        wins = inside & ((value > best) | is_nan(value))
        best = tl.where(wins, value, best)
        winner = tl.where(wins, tap, winner)

    if NHWC:
        out = (pixel * C)[:, None] + channel[None, :]
    else:
        out = (image * C * (P * Q) + place)[:, None] + (channel.to(INDEX) * (P * Q))[None, :]
    tl.store(y + out, round_to(best, y.dtype.element_ty), mask=exists)
    tl.store(index + out, winner.to(tl.uint8), mask=exists)


def bn_act_max_pool(a: Args) -> Out:
    """Launch `ops.bn_act_max_pool`."""
    x, size = a.x, pooled_size(a.x)
    order = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=order)
    index = torch.empty(size, dtype=torch.uint8, device=x.device, memory_format=order)
    view = reduction_of(y, 1, TILE[is_nhwc(x)])
    launch(
        _bn_act_max_pool_kernel,
        triton.cdiv(view.pixels, view.block_pixels) * triton.cdiv(view.channels, view.block_channels),
        x,
        a.scale,
        a.shift,
        y,
        index,
        *x.shape[2:],
        *size[2:],
        view.channels // view.unit,
        view.pixels,
        UNIT=view.unit,
        NHWC=is_nhwc(x),
        INDEX=index_type(x.numel()),
        BLOCK_PIXELS=view.block_pixels,
        BLOCK_CHANNELS=view.block_channels,
    )
    return Out(y, index)
