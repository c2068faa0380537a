"""Device functions of the statistics that a convolution forms of the tile it has just rounded."""

from __future__ import annotations

import triton
import triton.language as tl

from resnet_fused.kernels._tile import sum_lanes, to_fp32


@triton.jit
def _inverse(n):
    """1 / n in fp64: by Newton's step, since a GPU divides slowly there."""
    inverse = (1.0 / n).to(tl.float64)
    return inverse * (2.0 - n.to(tl.float64) * inverse)


@triton.jit
def store_tile_statistics(
    rounded,
    inside,
    pixels,
    mean,
    m2,
    count,
    row,
    K,
    channel,
    exists,
    first,
    PIXEL_AXIS: tl.constexpr = 0,
):
    """Row `row` of the statistics of a tile: of its `pixels` that are `inside` the mean, in fp64, and the sum of
    squared deviations from it; the number of pixels where `first`.

    One pass over the deviations d from a pivot, so that it stays exact where |mean| >> std: mean = pivot + sum(d) / n,
    m2 = sum(d * d) - sum(d)^2 / n. The pivot is the mean of the first eight pixels, of which those inside come first:
    of one alone, and an outlier, little would be left of m2.
    """
    FIRST: tl.constexpr = 8
    value = to_fp32(rounded)
    some = inside & (tl.arange(0, value.shape[PIXEL_AXIS]) < FIRST)
    pivot = tl.sum(tl.where(tl.expand_dims(some, 1 - PIXEL_AXIS), value, 0.0), axis=PIXEL_AXIS)
    pivot *= 1.0 / tl.minimum(pixels, FIRST).to(tl.float32)
    pivot = tl.where(tl.abs(pivot) < float("inf"), pivot, 0.0)
    deviation = value - tl.expand_dims(pivot, PIXEL_AXIS)
    deviation = tl.where(tl.expand_dims(inside, 1 - PIXEL_AXIS), deviation, 0.0)
    total = sum_lanes(deviation, PIXEL_AXIS).to(tl.float64)
    squares = sum_lanes(deviation * deviation, PIXEL_AXIS).to(tl.float64)
    n = pixels.to(tl.float32)
    inverse = _inverse(n)
    place = row * K + channel
    tl.store(mean + place, pivot.to(tl.float64) + total * inverse, mask=exists)
    tl.store(m2 + place, (squares - total * total * inverse).to(tl.float32), mask=exists)
    tl.store(count + row, n, mask=first)


@triton.jit
def store_statistics_in_two_steps(rounded, inside, pixels, mean, m2, count, row, K, channel, exists, first):
    """`store_tile_statistics` of pixels by channels: the mean, then the deviations from it, which holds fewer values at
    a time: on sm_100 the one pass spills behind accumulators of tensor memory.

    fp32 holds the sum of a tile of fp16 or bf16 values of one magnitude without rounding, so that fp64 has their mean.
    It does not hold that of fp32 values: there the deviations say what the mean lacks.
    """
    n = pixels.to(tl.float32)
    place = row * K + channel
    value = tl.where(inside[:, None], to_fp32(rounded), 0.0)
    exact = sum_lanes(value).to(tl.float64) * _inverse(n)
    tile_mean = exact.to(tl.float32)
    if rounded.dtype != tl.float32:
        tl.store(mean + place, exact, mask=exists)
    deviation = tl.where(inside[:, None], value - tile_mean[None, :], 0.0)
    squares = sum_lanes(deviation * deviation)
    if rounded.dtype == tl.float32:
        rest = sum_lanes(deviation) / n
        rest = tl.where(tl.abs(rest) < float("inf"), rest, 0.0)  # an infinite mean leaves none
        tl.store(mean + place, tile_mean.to(tl.float64) + rest.to(tl.float64), mask=exists)
        squares = tl.fma(-rest * n, rest, squares)
    tl.store(m2 + place, squares, mask=exists)
    tl.store(count + row, n, mask=first)
