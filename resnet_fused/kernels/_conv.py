"""What the convolution kernels share: the taps that fall inside an image, tiles, products, and the choice of dtypes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resnet_fused.dispatch.conv import uses_tf32 as uses_tf32  # for the kernels' files
from resnet_fused.kernels._launch import INTERPRETED
from resnet_fused.kernels._tile import to_fp32


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which tiles are multiplied. The interpreter multiplies the bit patterns of bf16; in fp32 the product
    is the same.
    """
    if dtype == torch.float32 or (INTERPRETED and dtype == torch.bfloat16):
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.int8: tl.int8}[dtype]


def accumulator(dtype: torch.dtype, prologue: bool = False) -> tl.dtype:
    """The dtype in which sums run: int32 of int8; else fp32, or the bits of it in int32 behind a prologue. Its product
    cannot run on into the next step anyhow, and one left running would make ptxas wait for every wgmma (C7515).
    """
    return tl.int32 if prologue or dtype == torch.int8 else tl.float32


@triton.jit
def taps_inside(
    h0, w0, H, W, step_h, step_w, R: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr, PADDED: tl.constexpr
):
    """Per pixel, which taps fall inside the image: filter row r (at h0 + r * step_h) in bit r, filter column s in bit
    16 + s. Where not PADDED nobody asks.
    """
    inside = tl.zeros((BLOCK_M,), tl.int32)
    if PADDED:
        for r in tl.static_range(R):
            h = h0 + r * step_h
            inside |= ((h >= 0) & (h < H)).to(tl.int32) << r
        for s in tl.static_range(S):
            w = w0 + s * step_w
            inside |= ((w >= 0) & (w < W)).to(tl.int32) << (16 + s)
    return inside


@triton.jit
def reduction_step(step, lane, channels, S: tl.constexpr, TAPS: tl.constexpr, FLAT: tl.constexpr):
    """Step `step` of the sum over (r, s, c): the tap, the channels in it, the place in a row of the weight, and which
    channels exist. FLAT > 0 is the number of channels of a reduction that runs over all taps together: then the taps
    are a vector. Else a step has one tap, and taps are innermost: only constants are divided by, and neighbouring taps
    read the same pixels.
    """
    BLOCK_K: tl.constexpr = lane.shape[0]
    if FLAT > 0:
        place = step * BLOCK_K + lane
        tap = place // FLAT
        r = tap // S
        return r, tap - r * S, place - tap * FLAT, place, place < TAPS * FLAT
    else:
        tap = step % TAPS
        c = step // TAPS * BLOCK_K + lane
        r = tap // S
        return r, tap - r * S, c, tap * channels + c, c < channels


@triton.jit
def sees_tap(inside, r, s, exists, PADDED: tl.constexpr, EVEN: tl.constexpr, FLAT: tl.constexpr, AXIS: tl.constexpr):
    """Which elements of a tile exist, whose pixels lie along AXIS: those of channels that do, inside the image."""
    valid = tl.expand_dims(exists, AXIS)
    if PADDED:
        wanted = (1 << r) | (1 << (s + 16))
        if FLAT:
            wanted = tl.expand_dims(tl.where(exists, wanted, 1 << 15), AXIS)  # a bit that is never set
            valid = (inside & wanted) == wanted
        else:
            inside_tap = (inside & wanted) == wanted
            valid = inside_tap if EVEN else inside_tap & valid
    return valid


@triton.jit
def load_tile(pointer, place, valid, MASKED: tl.constexpr):
    """The tile at `place`, zero where it is not valid; not MASKED, all of it is. Zero of no tensor."""
    if pointer is None:
        return 0.0
    elif MASKED:
        return tl.load(pointer + place, mask=valid, other=0.0)
    else:
        return tl.load(pointer + place)


@triton.jit
def load_padded(
    pointer, place, zero, channel, valid, exists, PADDED: tl.constexpr, EVEN: tl.constexpr, AXIS: tl.constexpr
):
    """The tile at `place` as `load_tile` has it, but outside the image each channel's `zero`. What differs are
    addresses, not values: those would go through registers on their way to shared memory.
    """
    if zero is None or not PADDED:
        return load_tile(pointer, place, valid, PADDED or not EVEN)
    else:
        address = tl.where(valid, pointer + place, tl.expand_dims(zero + channel, AXIS))
        return load_tile(address, 0, tl.expand_dims(exists, AXIS), not EVEN)


@triton.jit
def load_vector(pointer, place, exists, AXIS: tl.constexpr):
    """A value of each channel in fp32, zero where there is none, as a tile whose pixels lie along AXIS. Zero of no
    tensor.
    """
    if pointer is None:
        return 0.0
    else:
        return tl.expand_dims(to_fp32(tl.load(pointer + place, mask=exists, other=0.0)), AXIS)


@triton.jit
def add_product(acc, a, b, AXIS: tl.constexpr, PRECISION: tl.constexpr, DOT_DTYPE: tl.constexpr):
    """acc + a @ b, or transposed acc + b @ a where the rows of a lie along AXIS 1. acc is an `accumulator`."""
    total = acc if DOT_DTYPE == tl.int8 else acc.to(tl.float32, bitcast=True)
    if AXIS == 0:
        total = tl.dot(a.to(DOT_DTYPE), b.to(DOT_DTYPE), total, input_precision=PRECISION, out_dtype=total.dtype)
    else:
        total = tl.dot(b.to(DOT_DTYPE), a.to(DOT_DTYPE), total, input_precision=PRECISION, out_dtype=total.dtype)
    return total.to(acc.dtype, bitcast=True)


@triton.jit
def reciprocal(divisor):
    """What `divide` multiplies by, so that a loop need not divide, for which a GPU has no unit; of 0 that of 1."""
    return (0x80000000 // tl.maximum(divisor, 1).to(tl.uint32) + 1).to(tl.uint64)


@triton.jit
def divide(n, by):
    """n // divisor, given its reciprocal, where n * divisor < 2^31 (Granlund and Montgomery 1994)."""
    return (tl.cast(n, tl.uint64) * by >> 31).to(tl.int32)
