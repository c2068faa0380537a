"""Partial statistics to the affine map of a batch norm and its running statistics, and the activation behind it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels._launch import index_type, launch
from resnet_fused.kernels._tile import affine, channel_unit, relu, round_to, to_fp32
from resnet_fused.kernels.bn_apply import bn_apply
from resnet_fused.kernels.merge_statistics import merge_rows
from resnet_fused.kernels.reduce_rows import row_blocks
from resnet_fused.ops import bn_apply as apply_op
from resnet_fused.ops import bn_finalize as finalize_op
from resnet_fused.ops import bn_finalize_apply as finalize_apply_op

# A program of the pass behind it merges so many rows itself: they are about as many bytes as its tile.
FEW_ROWS = 16


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
    x,  # [pixels, C], or None; so is y = round(relu(x * scale + shift))
    y,
    rows,
    pixels,
    channel_units,  # C / UNIT
    momentum,
    eps,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """A program owns a tile of channels, and with x a tile of pixels: each merges the rows of its channels, the first
    of them writes what it found.
    """
    C = channel_units * UNIT
    tiles = tl.cdiv(C, BLOCK_CHANNELS)
    pid = tl.program_id(0)
    tile = pid // tiles
    channel = (pid - tile * tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    exists = channel < C
    every = (mean, m2, count, 0, rows, rows)
    exact, deviations, n_all = merge_rows(*every, channel, exists, C, BLOCK_ROWS, BLOCK_CHANNELS)
    variance = deviations / n_all
    merged = exact.to(tl.float32)
    invstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    factor = invstd
    if weight is not None:
        factor = invstd * to_fp32(tl.load(weight + channel * weight_stride, mask=exists, other=0.0))
    offset = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    if bias is not None:
        offset = to_fp32(tl.load(bias + channel * bias_stride, mask=exists, other=0.0))
    # Rounded once, and with the scale as it will be used: no more is lost where |mean| >> std.
    offset = (offset.to(tl.float64) - exact * factor.to(tl.float64)).to(tl.float32)
    if x is not None:
        pixel = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        place = pixel.to(INDEX)[:, None] * C + channel[None, :]
        valid = (pixel < pixels)[:, None] & exists[None, :]
        value = relu(affine(tl.load(x + place, mask=valid, other=0.0), factor[None, :], offset[None, :]))
        tl.store(y + place, round_to(value, y.dtype.element_ty), mask=valid)
    writes = exists & (tile == 0)
    tl.store(scale + channel, factor, mask=writes)
    tl.store(shift + channel, offset, mask=writes)
    tl.store(save_mean + channel, merged, mask=writes)
    tl.store(save_invstd + channel, invstd, mask=writes)
    if running_mean is not None:
        place = running_mean + channel * running_mean_stride
        old = to_fp32(tl.load(place, mask=writes, other=0.0))
        new = tl.fma(tl.zeros_like(merged) + momentum, merged, (1.0 - momentum) * old)
        tl.store(place, round_to(new, running_mean.dtype.element_ty), mask=writes)
    if running_var is not None:
        place = running_var + channel * running_var_stride
        old = to_fp32(tl.load(place, mask=writes, other=0.0))
        unbiased = variance * (n_all / (n_all - 1.0))
        new = tl.fma(tl.zeros_like(merged) + momentum, unbiased, (1.0 - momentum) * old)
        tl.store(place, round_to(new, running_var.dtype.element_ty), mask=writes)


def bn_finalize(a: finalize_op.Args) -> finalize_op.Out:
    """Launch `ops.bn_finalize`."""
    return _run(a)


def bn_finalize_apply(a: finalize_apply_op.Args) -> finalize_apply_op.Out:
    """Launch `ops.bn_finalize_apply`: one launch where there are few rows of statistics, which every program merges."""
    if a.mean.shape[0] <= FEW_ROWS and a.x.is_contiguous(memory_format=torch.channels_last):
        y = torch.empty_like(a.x)
        return finalize_apply_op.Out(*_run(a, a.x, y), y)
    norm = _run(a)
    y = bn_apply(apply_op.Args(a.x, norm.scale, norm.shift, None, None, None, relu=True, with_mask=False)).y
    return finalize_apply_op.Out(*norm, y)


def _run(
    a: finalize_op.Args | finalize_apply_op.Args, x: Tensor | None = None, y: Tensor | None = None
) -> finalize_op.Out:
    """Launch the kernel; x in NHWC order, with y like it, to be written; or neither."""
    rows, channels = a.mean.shape
    out = finalize_op.Out(*(torch.empty(channels, dtype=torch.float32, device=a.mean.device) for _ in range(4)))
    vectors = (a.weight, a.bias, a.running_mean, a.running_var)
    pixels = 0 if x is None else x.numel() // channels
    block_rows, block_channels = row_blocks(rows, channels)
    if x is not None:
        block_channels = min(64, block_channels)
    block_pixels = 4096 // block_channels
    unit = channel_unit(channels)
    launch(
        _bn_finalize_kernel,
        triton.cdiv(channels, block_channels) * max(1, triton.cdiv(pixels, block_pixels)),
        a.mean,
        a.m2,
        a.count,
        *vectors,
        *(0 if vector is None else vector.stride(0) for vector in vectors),
        *out,
        x,
        y,
        rows,
        pixels,
        channels // unit,
        a.momentum,
        a.eps,
        UNIT=unit,
        INDEX=index_type(0 if x is None else x.numel()),
        BLOCK_ROWS=block_rows,
        BLOCK_CHANNELS=block_channels,
        BLOCK_PIXELS=block_pixels,
    )
    return out
