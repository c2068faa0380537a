"""Partial statistics to the affine map of a batch norm and its running statistics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels._launch import launch
from resnet_fused.kernels._tile import round_to, sum_lanes, to_fp32
from resnet_fused.kernels.reduce_rows import row_blocks


@triton.jit
def _bn_finalize_kernel(
    mean,  # [rows, C] fp64
    m2,  # [rows, C]
    count,  # [rows]
    weight,  # [C] or None; so are bias and the running statistics, each with the stride that follows
    bias,
    running_mean,
    running_var,
    weight_stride,
    bias_stride,
    running_mean_stride,
    running_var_stride,
    scale,  # [C]
    shift,  # [C]
    save_mean,  # [C]
    save_invstd,  # [C]
    rows,
    C,
    momentum,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """A program owns a tile of channels and reads the partial rows twice: for the mean, then for the deviations from
    it.
    """
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    exists = channel < C
    lane = tl.arange(0, BLOCK_ROWS)
    # Row means relative to the first row's: their differences, and no more, are what fp32 has to hold.
    reference = tl.load(mean + channel, mask=exists, other=0.0)
    reference = tl.where(tl.abs(reference) < float("inf"), reference, 0.0)
    pixels = tl.zeros((BLOCK_ROWS,), tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + lane
        valid = (row < rows)[:, None] & exists[None, :]
        n = tl.load(count + row, mask=row < rows, other=0.0)
        row_mean = tl.load(mean + (row[:, None] * C + channel[None, :]), mask=valid, other=0.0)
        pixels += n
        total += tl.where(n[:, None] > 0.0, n[:, None] * (row_mean - reference[None, :]).to(tl.float32), 0.0)
    n_all = sum_lanes(pixels)
    delta = sum_lanes(total) / n_all

    deviations = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + lane
        valid = (row < rows)[:, None] & exists[None, :]
        n = tl.load(count + row, mask=row < rows, other=0.0)[:, None]
        row_mean = tl.load(mean + (row[:, None] * C + channel[None, :]), mask=valid, other=0.0)
        row_m2 = tl.load(m2 + (row[:, None] * C + channel[None, :]), mask=valid, other=0.0)
        spread = (row_mean - reference[None, :]).to(tl.float32) - delta[None, :]
        deviations += tl.where(n > 0.0, tl.fma(n * spread, spread, row_m2), 0.0)
    variance = sum_lanes(deviations) / n_all

    exact = reference + delta.to(tl.float64)
    merged = exact.to(tl.float32)
    invstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    factor = invstd
    if weight is not None:
        factor = invstd * to_fp32(tl.load(weight + channel * weight_stride, mask=exists, other=0.0))
    offset = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    if bias is not None:
        offset = to_fp32(tl.load(bias + channel * bias_stride, mask=exists, other=0.0))
    tl.store(scale + channel, factor, mask=exists)
    # Rounded once, and with the scale as it will be used: no more is lost where |mean| >> std.
    tl.store(shift + channel, (offset.to(tl.float64) - exact * factor.to(tl.float64)).to(tl.float32), mask=exists)
    tl.store(save_mean + channel, merged, mask=exists)
    tl.store(save_invstd + channel, invstd, mask=exists)
    if running_mean is not None:
        place = running_mean + channel * running_mean_stride
        old = to_fp32(tl.load(place, mask=exists, other=0.0))
        new = tl.fma(tl.zeros_like(merged) + momentum, merged, (1.0 - momentum) * old)
        tl.store(place, round_to(new, running_mean.dtype.element_ty), mask=exists)
    if running_var is not None:
        place = running_var + channel * running_var_stride
        old = to_fp32(tl.load(place, mask=exists, other=0.0))
        unbiased = variance * (n_all / (n_all - 1.0))
        new = tl.fma(tl.zeros_like(merged) + momentum, unbiased, (1.0 - momentum) * old)
        tl.store(place, round_to(new, running_var.dtype.element_ty), mask=exists)


def bn_finalize(
    mean: Tensor,
    m2: Tensor,
    count: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scale = weight * invstd and shift = bias - mean * scale from partial statistics, merged as in Chan, Golub,
    LeVeque 1979.

    Args:
        mean: [rows, C] fp64, contiguous.
        m2: [rows, C] fp32, contiguous: sums of squared deviations.
        count: [rows] fp32, contiguous: pixels of each row; 0 marks a row to pass over.
        weight: [C] or None for 1; fp32, fp16 or bf16, any stride. So are bias (None for 0), running_mean and
            running_var (None: not tracked).
        bias: see weight.
        running_mean: see weight; mutated to (1 - momentum) * running_mean + momentum * mean.
        running_var: see weight; mutated likewise, with the unbiased variance.
        momentum: weight of this batch.
        eps: added to the biased variance before the root.

    Returns:
        scale, shift, save_mean, save_invstd: [C], fp32.

    Mutates:
        running_mean, running_var.
    """
    rows, channels = mean.shape
    scale, shift, save_mean, save_invstd = (
        torch.empty(channels, dtype=torch.float32, device=mean.device) for _ in range(4)
    )
    block_rows, block_channels = row_blocks(rows, channels)
    vectors = (weight, bias, running_mean, running_var)
    launch(
        _bn_finalize_kernel,
        triton.cdiv(channels, block_channels),
        mean,
        m2,
        count,
        *vectors,
        *(0 if vector is None else vector.stride(0) for vector in vectors),
        scale,
        shift,
        save_mean,
        save_invstd,
        rows,
        channels,
        momentum,
        eps,
        BLOCK_ROWS=block_rows,
        BLOCK_CHANNELS=block_channels,
    )
    return scale, shift, save_mean, save_invstd
