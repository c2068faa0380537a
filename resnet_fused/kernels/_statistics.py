"""Device functions of the statistics that a convolution forms of the tile it has just rounded."""

from __future__ import annotations

import triton
import triton.language as tl

from resnet_fused.kernels._launch import INTERPRETED
from resnet_fused.kernels._tile import sum_lanes, to_fp32

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _rest_of_mean(total, mean, count):
    """total / count - mean, where `mean` is that quotient as it was rounded: in one fma exact, for which Triton's
    interpreter, whose fma rounds the product, takes fp64.
    """
    if _INTERPRETED:
        rest = (total.to(tl.float64) - mean.to(tl.float64) * count).to(tl.float32)
    else:
        rest = tl.fma(-mean, tl.zeros_like(mean) + count, total)
    return rest / count


@triton.jit
def store_tile_statistics(rounded, inside, pixels, mean, m2, count, row, K, channel, exists, first):
    """Row `row` of the statistics of a tile: of its `pixels` rows that are `inside` the mean, in fp64, and the sum of
    squared deviations from it; the number of pixels where `first`.

    Two steps, the mean and the deviations from it, stay exact where |mean| >> std. fp32 holds the sum of a tile of fp16
    or bf16 values of one magnitude without rounding, so that the mean lacks what its division loses; of fp32 values it
    does not, and the deviations say what the mean lacks.
    """
    n = pixels.to(tl.float32)
    value = tl.where(inside[:, None], to_fp32(rounded), 0.0)
    total = sum_lanes(value)
    tile_mean = total / n
    deviation = tl.where(inside[:, None], value - tile_mean[None, :], 0.0)
    squares = sum_lanes(deviation * deviation)
    if rounded.dtype == tl.float32:
        rest = sum_lanes(deviation) / n
    else:
        rest = _rest_of_mean(total, tile_mean, n)
    rest = tl.where(tl.abs(rest) < float("inf"), rest, 0.0)
    place = row * K + channel
    tl.store(mean + place, tile_mean.to(tl.float64) + rest.to(tl.float64), mask=exists)
    tl.store(m2 + place, tl.fma(-rest * n, rest, squares), mask=exists)
    tl.store(count + row, n, mask=first)
