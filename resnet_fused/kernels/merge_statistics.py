"""Partial statistics to fewer of them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.dispatch.conv import MAX_REGISTERS
from resnet_fused.kernels._launch import launch
from resnet_fused.kernels._tile import sum_lanes
from resnet_fused.kernels.reduce_rows import row_blocks


@triton.jit
def merge_rows(
    mean,
    m2,
    count,
    first,
    end,
    span,
    channel,
    exists,
    C,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """(mean in fp64, sum of squared deviations from it, pixels) of the rows from `first` to `end`, at most `span`, of a
    tile of channels. The rows are read twice: for the mean, then for the deviations. A row of no pixels says nothing.
    """
    lane = tl.arange(0, BLOCK_ROWS)
    # Row means relative to the first row's: their differences, and no more, are what fp32 has to hold.
    reference = tl.load(mean + first * C + channel, mask=exists & (first < end), other=0.0)
    reference = tl.where(tl.abs(reference) < float("inf"), reference, 0.0)
    pixels = tl.zeros((BLOCK_ROWS,), tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, span, BLOCK_ROWS):
        row = first + start + lane
        valid = (row < end)[:, None] & exists[None, :]
        n = tl.load(count + row, mask=row < end, other=0.0)
        row_mean = tl.load(mean + (row[:, None] * C + channel[None, :]), mask=valid, other=0.0)
        pixels += n
        total += tl.where(n[:, None] > 0.0, n[:, None] * (row_mean - reference[None, :]).to(tl.float32), 0.0)
    n_all = sum_lanes(pixels)
    delta = sum_lanes(total) / n_all

    deviations = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, span, BLOCK_ROWS):
        row = first + start + lane
        valid = (row < end)[:, None] & exists[None, :]
        n = tl.load(count + row, mask=row < end, other=0.0)[:, None]
        row_mean = tl.load(mean + (row[:, None] * C + channel[None, :]), mask=valid, other=0.0)
        row_m2 = tl.load(m2 + (row[:, None] * C + channel[None, :]), mask=valid, other=0.0)
        spread = (row_mean - reference[None, :]).to(tl.float32) - delta[None, :]
        deviations += tl.where(n > 0.0, tl.fma(n * spread, spread, row_m2), 0.0)
    return reference + delta.to(tl.float64), sum_lanes(deviations), n_all


@triton.jit
def _merge_statistics_kernel(
    mean,  # [tiles, C] fp64
    m2,  # [tiles, C]
    count,  # [tiles]
    merged_mean,  # [rows, C] fp64
    merged_m2,  # [rows, C]
    merged_count,  # [rows]
    tiles,
    span,
    C,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Row r merges the r-th range of `span` tiles: mean = sum(n * mean) / sum(n), m2 = sum(m2 + n * (mean - merged)^2).

    A program owns one row and one tile of channels, and reads its range twice.
    """
    blocks = tl.cdiv(C, BLOCK_CHANNELS)
    pid = tl.program_id(0)
    row = pid // blocks
    channel = (pid - row * blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    exists = channel < C
    first = tl.minimum(row.to(tl.int64) * span, tiles)
    end = tl.minimum(first + span, tiles)
    rows = (mean, m2, count, first, end, span)
    exact, deviations, n_all = merge_rows(*rows, channel, exists, C, BLOCK_ROWS, BLOCK_CHANNELS)
    out = row.to(tl.int64) * C + channel
    tl.store(merged_mean + out, tl.where(n_all > 0.0, exact, 0.0), mask=exists)
    tl.store(merged_m2 + out, deviations, mask=exists)
    tl.store(merged_count + row, n_all, mask=pid == row * blocks)


def merge_statistics(mean: Tensor, m2: Tensor, count: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sum of squared deviations and number of pixels of `rows` consecutive ranges of tiles.

    Args:
        mean: [tiles, C] fp64, contiguous; m2 is [tiles, C] and count [tiles], fp32. At least one pixel a tile.
        m2: see mean.
        count: see mean.
        rows: how many ranges, of ceil(tiles / rows) tiles each; the last may be short or empty (0, 0, 0).

    Returns:
        mean, m2, count: [rows, C], [rows, C], [rows], likewise.

    Source: Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    tiles, channels = mean.shape
    merged_mean, merged_m2 = (t.new_empty(rows, channels) for t in (mean, m2))
    merged_count = count.new_empty(rows)
    span = triton.cdiv(tiles, rows)
    block_rows, block_channels = row_blocks(span, channels)
    launch(
        _merge_statistics_kernel,
        rows * triton.cdiv(channels, block_channels),
        mean,
        m2,
        count,
        merged_mean,
        merged_m2,
        merged_count,
        tiles,
        span,
        channels,
        BLOCK_ROWS=block_rows,
        BLOCK_CHANNELS=block_channels,
        maxnreg=MAX_REGISTERS,
    )
    return merged_mean, merged_m2, merged_count
