"""Device functions of the data gradient: the pixels of a parity class, and the sums of the block before."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from resnet_fused.kernels._tile import passes_bit, sum_lanes, to_fp32

SUM_TILE = 512  # elements of a step of `written_sums` for each warp: 16 a thread, so that they fit beside three sums


def sum_group(tiles: int) -> int:
    """How many sums of tiles, and then of groups of tiles, one program adds at most."""
    return max(64, triton.next_power_of_2(math.isqrt(max(tiles, 1) - 1) + 1))


@triton.jit
def class_pixel(row, class_h, class_w):
    """(image, h, w) of a pixel of a parity class, which may be empty."""
    w = row % tl.maximum(class_w, 1)
    h = (row // tl.maximum(class_w, 1)) % tl.maximum(class_h, 1)
    return row // tl.maximum(class_h * class_w, 1), h, w


@triton.jit
def image_pixel(row, class_h, class_w, i, j, H, W, stride_h, stride_w):
    """The index in the whole image of a pixel of parity class (i, j)."""
    image, h, w = class_pixel(row, class_h, class_w)
    return (image * H + h * stride_h + i) * W + w * stride_w + j


@triton.jit
def written_sums(
    dx,
    x,
    mask,
    mean,
    shortcut,
    shortcut_mean,
    first,
    M,
    class_h,
    class_w,
    i,
    j,
    H,
    W,
    stride_h,
    stride_w,
    C,
    channel,
    stored,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """sum(dz), sum(dz * (x - mean)) and sum(dz * (shortcut - shortcut_mean)) over a tile of pixels from `first` on, dz
    = dx, with a mask where it is set and else 0.

    What the program itself has written to dx is read again, out of a cache and a few rows at a time: all operands at
    once, beside the accumulator, are more than there are registers, and on sm_90 ptxas would wait for every wgmma.
    """
    tl.debug_barrier()  # dx was written by other threads
    channel_mean = tl.load(mean + channel, mask=stored, other=0.0)[None, :]
    if shortcut is not None:
        other_mean = tl.load(shortcut_mean + channel, mask=stored, other=0.0)[None, :]
    total = tl.zeros((ROWS, BLOCK_N), tl.float32)
    total_x = tl.zeros((ROWS, BLOCK_N), tl.float32)
    total_shortcut = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in range(0, BLOCK_M, ROWS):
        row = first + start + tl.arange(0, ROWS)
        pixel = image_pixel(row, class_h, class_w, i, j, H, W, stride_h, stride_w)
        offset = pixel[:, None] * C + channel[None, :]
        valid = (row < M)[:, None] & stored[None, :]
        dz = to_fp32(tl.load(dx + offset, mask=valid, other=0.0))
        if mask is not None:
            dz = tl.where(passes_bit(mask, offset, valid), dz, 0.0)
        value = to_fp32(tl.load(x + offset, mask=valid, other=0.0))
        total += dz
        total_x = tl.fma(dz, tl.where(valid, value - channel_mean, 0.0), total_x)
        if shortcut is not None:
            other = to_fp32(tl.load(shortcut + offset, mask=valid, other=0.0))
            total_shortcut = tl.fma(dz, tl.where(valid, other - other_mean, 0.0), total_shortcut)
    return sum_lanes(total), sum_lanes(total_x), sum_lanes(total_shortcut)


@triton.jit
def last_to_arrive(counter, expected, arrives):
    """Whether this program, if it arrives, is the last of `expected` to arrive at a counter, which it leaves at zero.
    It sees what the others stored before they arrived.
    """
    tl.debug_barrier()  # all of this program's threads have stored
    last = arrives & (tl.atomic_add(counter, 1, mask=arrives, sem="acq_rel") == expected - 1)
    tl.store(counter, 0, mask=last)
    tl.debug_barrier()
    return last


@triton.jit
def add_rows(
    rows,
    plane,
    total,
    total_x,
    total_shortcut,
    count,
    C,
    channel,
    stored,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """total[c] = the sum of rows[:count, c], in one fixed order; of the other planes likewise.

    Nothing where `count` is 0: on sm_90 a branch, or a loop of unknown length, would make ptxas wait for every wgmma.
    """
    acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
    acc_x = tl.zeros((ROWS, BLOCK_N), tl.float32)
    acc_shortcut = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for start in tl.static_range(0, GROUP, ROWS):
        row = start + tl.arange(0, ROWS)
        valid = (row < count)[:, None] & stored[None, :]
        # Past what this multiprocessor has cached: others have written it.
        place = rows + (row[:, None] * C + channel[None, :])
        acc += tl.load(place, mask=valid, other=0.0, cache_modifier=".cg")
        acc_x += tl.load(place + plane, mask=valid, other=0.0, cache_modifier=".cg")
        if total_shortcut is not None:
            acc_shortcut += tl.load(place + 2 * plane, mask=valid, other=0.0, cache_modifier=".cg")
    written = stored & (count > 0)
    tl.store(total + channel, sum_lanes(acc), mask=written)
    tl.store(total_x + channel, sum_lanes(acc_x), mask=written)
    if total_shortcut is not None:
        tl.store(total_shortcut + channel, sum_lanes(acc_shortcut), mask=written)


@triton.jit
def add_tiles(
    sums,
    plane,
    total,
    total_x,
    total_shortcut,
    counters,
    tile,
    tiles,
    C,
    channel,
    stored,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums of all tiles of pixels, by the programs that come last: the last of GROUP tiles adds theirs, the last of
    the groups, at most GROUP, those. Which program that is changes no bit: each adds the same rows in the same order.

    Args:
        sums: planes of rows [C]: one row a tile, and behind them one a group.
        plane: elements of each.
        counters: this column of tiles' own, zeros: one for the groups, and one for each group.
        tile, tiles: this program's tile, and how many there are.
    """
    groups = tl.cdiv(tiles, GROUP)
    group = tile // GROUP
    count = tl.minimum(tiles - group * GROUP, GROUP)
    last = last_to_arrive(counters + 1 + group, count, tile >= 0)
    rows = sums + (tl.zeros_like(plane) + group) * GROUP * C
    group_rows = sums + (tl.zeros_like(plane) + tiles) * C
    out = group_rows + group * C
    out_shortcut = None if total_shortcut is None else out + 2 * plane
    count = tl.where(last, count, 0)
    add_rows(rows, plane, out, out + plane, out_shortcut, count, C, channel, stored, GROUP, ROWS, BLOCK_N)
    count = tl.where(last_to_arrive(counters, groups, last), groups, 0)
    totals = (total, total_x, total_shortcut)
    add_rows(group_rows, plane, *totals, count, C, channel, stored, GROUP, ROWS, BLOCK_N)
