"""Device functions of the statistics that a convolution forms of the tile it has just rounded."""

from __future__ import annotations

import triton
import triton.language as tl

from resnet_fused.kernels._tile import sum_lanes, to_fp32


@triton.jit
def store_tile_statistics(rounded, inside, pixels, mean, m2, count, row, K, channel, exists, first):
    """Row `row` of the statistics of a tile: of its `pixels` rows that are `inside` the mean, in fp64, and the sum of
    squared deviations from it; the number of pixels where `first`.

    Two steps, the mean and the deviations from it, stay exact where |mean| >> std. fp32 holds the sum of a tile of fp16
    or bf16 values of one magnitude without rounding, so that fp64 has their mean. It does not hold that of fp32 values:
    there the deviations say what the mean lacks.
    """
    n = pixels.to(tl.float32)
    place = row * K + channel
    value = tl.where(inside[:, None], to_fp32(rounded), 0.0)
    inverse = (1.0 / n).to(tl.float64)
    inverse = inverse * (2.0 - n.to(tl.float64) * inverse)  # Newton's step, for a division in fp64
    exact = sum_lanes(value).to(tl.float64) * inverse
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
