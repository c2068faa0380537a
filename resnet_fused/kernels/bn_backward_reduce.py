"""The two sums over pixels that a batch norm's backward needs, behind the ReLU's mask."""

from __future__ import annotations

import triton
import triton.language as tl

from resnet_fused.kernels._launch import index_type, launch
from resnet_fused.kernels._tile import (
    partials_like,
    passes_bit,
    passes_relu,
    pixel_offset,
    reduction_of,
    reduction_tile,
    sum_lanes,
    to_fp32,
)
from resnet_fused.kernels.reduce_rows import reduce_alike
from resnet_fused.ops.bn_backward_reduce import Args, Out


@triton.jit
def _bn_backward_reduce_kernel(
    dy,  # NHWC or NCHW; so is x
    x,
    mask,  # one bit an element, or None
    scale,  # [C]; so are shift, mean, invstd
    shift,
    mean,
    invstd,
    sum_dy,  # [rows, C]
    sum_dy_xhat,  # [rows, C]
    channel_units,  # C / UNIT
    inner,
    pixels,
    span,
    ACTIVATE: tl.constexpr,
    UNIT: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """sum(dz) and sum(dz * xhat), dz = mask ? dy : 0; a program owns one range of pixels and one tile of channels; dy
    and x are read once.
    """
    C = channel_units * UNIT
    row, first, end, channel, channel_offset = reduction_tile(C, inner, pixels, span, NHWC, INDEX, BLOCK_CHANNELS)
    exists = channel < C
    channel_mean = tl.load(mean + channel, mask=exists, other=0.0)
    if ACTIVATE and mask is None:
        channel_scale = tl.load(scale + channel, mask=exists, other=0.0)[None, :]
        channel_shift = tl.load(shift + channel, mask=exists, other=0.0)[None, :]
    total = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    total_x = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, span, BLOCK_PIXELS):
        pixel = first + start + tl.arange(0, BLOCK_PIXELS)
        offset = pixel_offset(pixel, C, inner, NHWC)[:, None] + channel_offset[None, :]
        valid = (pixel < end)[:, None] & exists[None, :]
        value = tl.load(x + offset, mask=valid, other=0.0)
        dz = to_fp32(tl.load(dy + offset, mask=valid, other=0.0))
        if ACTIVATE:
            if mask is not None:
                keep = passes_bit(mask, offset, valid)
            else:
                keep = passes_relu(value, channel_scale, channel_shift)
            dz = tl.where(keep, dz, 0.0)
        centred = tl.where(valid, to_fp32(value) - channel_mean[None, :], 0.0)
        total += dz
        total_x = tl.fma(dz, centred, total_x)
    out = row * C + channel
    tl.store(sum_dy + out, sum_lanes(total), mask=exists)
    tl.store(sum_dy_xhat + out, sum_lanes(total_x) * tl.load(invstd + channel, mask=exists, other=0.0), mask=exists)


def bn_backward_reduce(a: Args) -> Out:
    """Launch `ops.bn_backward_reduce`."""
    view = reduction_of(a.x, a.rows)
    partials = partials_like(a.x, a.rows)
    launch(
        _bn_backward_reduce_kernel,
        view.grid,
        a.dy,
        a.x,
        a.mask if a.relu else None,
        a.scale,
        a.shift,
        a.mean,
        a.invstd,
        *partials,
        view.channels // view.unit,
        view.inner,
        view.pixels,
        view.span,
        ACTIVATE=a.relu,
        UNIT=view.unit,
        NHWC=view.nhwc,
        INDEX=index_type(a.x.numel(), partials[0].numel()),
        BLOCK_PIXELS=view.block_pixels,
        BLOCK_CHANNELS=view.block_channels,
    )
    return Out(*reduce_alike(*partials))
