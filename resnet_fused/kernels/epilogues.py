"""What a convolution does to its sums before they are rounded: one of these functions, a constant of the kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from resnet_fused.kernels._conv import load_vector
from resnet_fused.kernels._tile import passes_bit, passes_relu, to_fp32


@triton.jit
def sums(acc):
    """The sums in fp32. Zero is added, for where a select or a conversion is the first to read an accumulator, ptxas
    waits for every wgmma (C7514).
    """
    return acc.to(tl.float32, bitcast=True) + 0.0


@triton.jit
def scale_shift(acc, scale, shift, channel, exists, AXIS: tl.constexpr = 0):
    """acc * scale + shift in one fma; scale and shift may be None."""
    offset = load_vector(shift, channel, exists, AXIS)
    if scale is not None:
        factor = load_vector(scale, channel, exists, AXIS)
        if shift is None:
            offset = tl.zeros_like(factor)
        acc = acc.to(tl.float32, bitcast=True)
        return tl.fma(acc, tl.broadcast_to(factor, acc.shape), tl.broadcast_to(offset, acc.shape))
    elif shift is not None:
        return acc.to(tl.float32, bitcast=True) + offset
    else:
        return sums(acc)


# Of a forward convolution


@triton.jit
def no_epilogue(
    acc, scale, shift, residual, grids, channel, exists, place, valid, ACT: tl.constexpr, AXIS: tl.constexpr
):
    """acc"""
    return sums(acc)


@triton.jit
def affine_act(
    acc, scale, shift, residual, grids, channel, exists, place, valid, ACT: tl.constexpr, AXIS: tl.constexpr
):
    """ACT(acc * scale + shift)"""
    return ACT(scale_shift(acc, scale, shift, channel, exists, AXIS))


@triton.jit
def affine_add_act(
    acc, scale, shift, residual, grids, channel, exists, place, valid, ACT: tl.constexpr, AXIS: tl.constexpr
):
    """ACT(acc * scale + shift + residual)"""
    acc = scale_shift(acc, scale, shift, channel, exists, AXIS)
    return ACT(acc + to_fp32(tl.load(residual + place, mask=valid, other=0.0)))


@triton.jit
def int8_affine_add_act(
    acc, scale, shift, residual, grids, channel, exists, place, valid, ACT: tl.constexpr, AXIS: tl.constexpr
):
    """ACT((acc + offset) * scale + shift + residual) of sums in int32; the residual is on a grid, the result to be."""
    offset, residual_scale, residual_zero, steps, zero = grids
    value = scale_shift(exact_sums(acc, offset, channel, exists, AXIS), scale, shift, channel, exists, AXIS)
    if residual is not None:
        value += (to_fp32(tl.load(residual + place, mask=valid, other=0)) - residual_zero) * residual_scale
    return requantise(ACT(value), steps, zero)


# Of int8 operands


@triton.jit
def exact_sums(acc, offset, channel, exists, AXIS: tl.constexpr = 0):
    """Sums and offset are added in int32, where nothing is lost, and then in fp32."""
    return (acc + tl.expand_dims(tl.load(offset + channel, mask=exists, other=0), AXIS)).to(tl.float32)


@triton.jit
def requantise(value, steps, zero):
    """What is to be rounded to int8 on a grid of so many steps to 1; where there is none, the value."""
    if steps is None:
        return value
    else:
        return value * steps + zero


# Of a data gradient


@triton.jit
def no_gradient_epilogue(acc, residual, residual_mask, x, scale, shift, channel, exists, place, valid):
    """acc"""
    return sums(acc)


@triton.jit
def add_residual(acc, residual, residual_mask, x, scale, shift, channel, exists, place, valid):
    """acc + residual, where its mask, if there is one, has a 1"""
    addend = to_fp32(tl.load(residual + place, mask=valid, other=0.0))
    if residual_mask is not None:
        addend = tl.where(passes_bit(residual_mask, place, valid), addend, 0.0)
    return acc.to(tl.float32, bitcast=True) + addend


@triton.jit
def apply_relu_mask(acc, residual, residual_mask, x, scale, shift, channel, exists, place, valid):
    """acc where x * scale + shift passed its ReLU, else 0"""
    value = tl.load(x + place, mask=valid, other=0.0)
    keep = passes_relu(value, load_vector(scale, channel, exists, 0), load_vector(shift, channel, exists, 0))
    return tl.where(keep & valid, sums(acc), 0.0)
