"""What the convolution kernels share: taps inside the image, prologues, precision, the problem."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resnet_fused.dispatch.conv import uses_tf32 as uses_tf32  # for the kernels' files
from resnet_fused.kernels._launch import INTERPRETED
from resnet_fused.kernels._tile import affine, round_to, to_fp32


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which tiles are multiplied. The interpreter multiplies the bit patterns of bf16; in fp32 the product
    is the same.
    """
    if dtype == torch.float32 or (INTERPRETED and dtype == torch.bfloat16):
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


@triton.jit
def taps_inside(h0, w0, H, W, step_h, step_w, R: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr):
    """Per pixel, which taps fall inside the image: filter row r (at h0 + r * step_h) in bit r, filter column s in bit
    16 + s.
    """
    inside = tl.zeros((BLOCK_M,), tl.int32)
    for r in tl.static_range(R):
        h = h0 + r * step_h
        inside |= ((h >= 0) & (h < H)).to(tl.int32) << r
    for s in tl.static_range(S):
        w = w0 + s * step_w
        inside |= ((w >= 0) & (w < W)).to(tl.int32) << (16 + s)
    return inside


@triton.jit
def add_product(acc, a, b, PRECISION: tl.constexpr, DOT_DTYPE: tl.constexpr):
    """acc + a @ b. The accumulator is fp32, or the bits of it in int32 where an operand is computed in registers: its
    product cannot run on into the next step anyhow, and one left running would make ptxas wait for every wgmma (C7515).
    """
    total = acc.to(tl.float32, bitcast=True)
    total = tl.dot(a.to(DOT_DTYPE), b.to(DOT_DTYPE), total, input_precision=PRECISION)
    return total.to(acc.dtype, bitcast=True)


@triton.jit
def finished(acc):
    """The sums in fp32. Zero is added, for where a select or a conversion is the first to read an accumulator, ptxas
    waits for every wgmma (C7514).
    """
    return acc.to(tl.float32, bitcast=True) + 0.0


@triton.jit
def reciprocal(divisor):
    """What `divide` multiplies by, so that a loop need not divide, for which a GPU has no unit; of 0 that of 1."""
    return (0x80000000 // tl.maximum(divisor, 1).to(tl.uint32) + 1).to(tl.uint64)


@triton.jit
def divide(n, by):
    """n // divisor, given its reciprocal, where n * divisor < 2^31 (Granlund and Montgomery 1994)."""
    return (tl.cast(n, tl.uint64) * by >> 31).to(tl.int32)


@triton.jit
def relu_affine(x, scale, shift):
    """The prologue of fprop and wgrad: relu(x * scale + shift) in fp32; a NaN stays."""
    return tl.maximum(affine(x, scale, shift), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activation_tile(x, scale, shift, exists, valid, PADDED: tl.constexpr, AXIS: tl.constexpr = 0):
    """The tile round(relu(x * scale + shift)): zero in the padding, and past the last channel, where scale and shift
    are. Pixels lie along AXIS.
    """
    channel_scale = tl.expand_dims(to_fp32(tl.load(scale, mask=exists, other=0.0)), AXIS)
    channel_shift = tl.expand_dims(to_fp32(tl.load(shift, mask=exists, other=0.0)), AXIS)
    value = relu_affine(x, channel_scale, channel_shift)
    if PADDED:  # without padding no mask on the tile, which on sm_90 would cost it a way through shared memory
        value = tl.where(valid, value, 0.0)
    return round_to(value, x.dtype)


@triton.jit
def bn_gradient(dy, x, a, b, c):
    """The prologue of dgrad and wgrad: a batch norm's backward a * dy + b * x + c, in fp32."""
    return tl.fma(to_fp32(dy), a, affine(x, b, c))
