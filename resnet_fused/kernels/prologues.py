"""What a convolution does to a tile of an activation before it multiplies it: one of these functions, a constant of the
kernel. A tile that is not `valid` everywhere (MASKED) is zero elsewhere, and stays so.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resnet_fused.kernels._tile import affine, round_to, to_fp32


@triton.jit
def relu_affine(x, scale, shift):
    """relu(x * scale + shift) in fp32; a NaN stays."""
    return tl.maximum(affine(x, scale, shift), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def no_activation(x, scale, shift, valid, MASKED: tl.constexpr):
    """x"""
    return x


@triton.jit
def activation(x, scale, shift, valid, MASKED: tl.constexpr):
    """round(relu(x * scale + shift)), the batch norm and ReLU in front."""
    value = relu_affine(x, scale, shift)
    if MASKED:  # else no mask on the tile, which on sm_90 would cost it a way through shared memory
        value = tl.where(valid, value, 0.0)
    return round_to(value, x.dtype)


@triton.jit
def no_bn_gradient(dy, x, a, b, c, valid, MASKED: tl.constexpr):
    """dy"""
    return dy


@triton.jit
def bn_gradient(dy, x, a, b, c, valid, MASKED: tl.constexpr):
    """round(a * dy + b * x + c), the backward of the batch norm behind."""
    value = tl.fma(to_fp32(dy), a, affine(x, b, c))
    if MASKED:
        value = tl.where(valid, value, 0.0)
    return round_to(value, dy.dtype)
