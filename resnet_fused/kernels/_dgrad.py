"""Device functions of the data gradient: the pixels of a parity class, and the sums of the block before."""

from __future__ import annotations

import triton
import triton.language as tl

from resnet_fused.kernels._tile import passes_bit, round_to, sum_lanes, to_fp32
from resnet_fused.kernels.prologues import relu_affine

SUM_TILE = 512  # elements of a step of `written_sums` for each warp: 16 a thread, so that they fit beside three sums


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
    activation,
    scale,
    shift,
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
    = dx, with a mask where it is set and else 0; and the activation = round(relu(x * scale + shift)) written, or None.

    What the program itself has written to dx is read again, out of a cache and a few rows at a time: all operands at
    once, beside the accumulator, are more than there are registers, and on sm_90 ptxas would wait for every wgmma.
    """
    tl.debug_barrier()  # dx was written by other threads
    channel_mean = tl.load(mean + channel, mask=stored, other=0.0)[None, :]
    if shortcut is not None:
        other_mean = tl.load(shortcut_mean + channel, mask=stored, other=0.0)[None, :]
    if activation is not None:
        channel_scale = tl.load(scale + channel, mask=stored, other=0.0)[None, :]
        channel_shift = tl.load(shift + channel, mask=stored, other=0.0)[None, :]
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
        raw = tl.load(x + offset, mask=valid, other=0.0)
        if activation is not None:
            normalised = round_to(relu_affine(raw, channel_scale, channel_shift), activation.dtype.element_ty)
            tl.store(activation + offset, normalised, mask=valid)
        value = to_fp32(raw)
        total += dz
        total_x = tl.fma(dz, tl.where(valid, value - channel_mean, 0.0), total_x)
        if shortcut is not None:
            other = to_fp32(tl.load(shortcut + offset, mask=valid, other=0.0))
            total_shortcut = tl.fma(dz, tl.where(valid, other - other_mean, 0.0), total_shortcut)
    return sum_lanes(total), sum_lanes(total_x), sum_lanes(total_shortcut)
