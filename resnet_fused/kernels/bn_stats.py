"""Per-channel statistics of an activation, as partial rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resnet_fused.kernels._launch import index_type, launch
from resnet_fused.kernels._tile import pixel_offset, reduction_of, reduction_tile, sum_lanes, to_fp32
from resnet_fused.ops.bn_stats import Args, Out


@triton.jit
def _bn_stats_kernel(
    x,  # NHWC or NCHW
    mean,  # [rows, C] fp64
    m2,  # [rows, C]
    count,  # [rows]
    channel_units,  # C / UNIT
    inner,
    pixels,
    span,
    UNIT: tl.constexpr,
    NHWC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """A program owns one range of pixels and one tile of channels; one read of x.

    Every lane of the tile sums the deviations from its own first value and their squares, which is exact where |mean|
    >> std, and the lanes merge as in Chan, Golub, LeVeque 1979. An outlier as first value costs precision in that one
    lane only.
    """
    C = channel_units * UNIT
    row, first, end, channel, channel_offset = reduction_tile(C, inner, pixels, span, NHWC, INDEX, BLOCK_CHANNELS)
    exists = channel < C
    lane = tl.arange(0, BLOCK_PIXELS)
    n = tl.cdiv(tl.maximum((end - first).to(tl.int32) - lane, 0), BLOCK_PIXELS).to(tl.float32)[:, None]

    offset = pixel_offset(first + lane, C, inner, NHWC)
    valid = (first + lane < end)[:, None] & exists[None, :]
    pivot = to_fp32(tl.load(x + (offset[:, None] + channel_offset[None, :]), mask=valid, other=0.0))
    pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)  # an inf or a NaN enters through the sums
    total = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    squares = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, span, BLOCK_PIXELS):
        pixel = first + start + lane
        offset = pixel_offset(pixel, C, inner, NHWC)
        valid = (pixel < end)[:, None] & exists[None, :]
        value = to_fp32(tl.load(x + (offset[:, None] + channel_offset[None, :]), mask=valid, other=0.0))
        deviation = tl.where(valid, value - pivot, 0.0)
        total += deviation
        squares = tl.fma(deviation, deviation, squares)

    # Lane means relative to one reference per channel, so that the merge cancels nothing either.
    reference = sum_lanes(tl.where(lane[:, None] == 0, pivot, 0.0))
    at_least_one = tl.maximum(n, 1.0)
    lane_delta = total / at_least_one
    lane_m2 = tl.fma(-total, lane_delta, squares)
    lane_m2 = tl.where(lane_m2 < 0.0, 0.0, lane_m2)
    delta = tl.where(n > 0.0, (pivot - reference[None, :]) + lane_delta, 0.0)
    pixels_in_range = sum_lanes(n)
    merged = sum_lanes(n * delta) / tl.maximum(pixels_in_range, 1.0)
    spread = delta - merged[None, :]
    merged_m2 = sum_lanes(tl.where(n > 0.0, tl.fma(n * spread, spread, lane_m2), 0.0))

    out = row * C + channel
    tl.store(mean + out, reference.to(tl.float64) + merged.to(tl.float64), mask=exists)
    tl.store(m2 + out, merged_m2, mask=exists)
    tl.store(count + row + tl.zeros((BLOCK_CHANNELS,), tl.int32), (end - first).to(tl.float32), mask=channel == 0)


def bn_stats(a: Args) -> Out:
    """Launch `ops.bn_stats`."""
    x = a.x
    view = reduction_of(x, a.rows)
    mean = torch.empty((a.rows, view.channels), dtype=torch.float64, device=x.device)
    m2 = torch.empty((a.rows, view.channels), dtype=torch.float32, device=x.device)
    count = torch.empty(a.rows, dtype=torch.float32, device=x.device)
    launch(
        _bn_stats_kernel,
        view.grid,
        x,
        mean,
        m2,
        count,
        view.channels // view.unit,
        view.inner,
        view.pixels,
        view.span,
        UNIT=view.unit,
        NHWC=view.nhwc,
        INDEX=index_type(x.numel(), mean.numel()),
        BLOCK_PIXELS=view.block_pixels,
        BLOCK_CHANNELS=view.block_channels,
    )
    return Out(mean, m2, count)
