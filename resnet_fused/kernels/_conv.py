"""What the convolution kernels share: taps inside the image, prologues, precision, and the checks of operands."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._prims_common import suggest_memory_format

from resnet_fused.kernels._launch import INTERPRETED, is_nhwc, name_of, refuse_activations
from resnet_fused.kernels._launch import MAX_REGISTERS as MAX_REGISTERS  # for the kernels' files
from resnet_fused.kernels._tile import affine, round_to, to_fp32
from resnet_fused.plan.conv import ConvShape
from resnet_fused.plan.conv import uses_tf32 as uses_tf32  # for the kernels' files


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
def relu_affine(x, scale, shift):
    """The prologue of fprop and wgrad: relu(x * scale + shift) in fp32; a NaN stays."""
    return tl.maximum(affine(x, scale, shift), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activation_tile(x, scale, shift, exists, valid, PADDED: tl.constexpr):
    """The tile round(relu(x * scale + shift)): zero in the padding, and past the last channel, where scale and shift
    are.
    """
    channel_scale = to_fp32(tl.load(scale, mask=exists, other=0.0))[None, :]
    channel_shift = to_fp32(tl.load(shift, mask=exists, other=0.0))[None, :]
    value = relu_affine(x, channel_scale, channel_shift)
    if PADDED:  # without padding no mask on the tile, which on sm_90 would cost it a way through shared memory
        value = tl.where(valid, value, 0.0)
    return round_to(value, x.dtype)


@triton.jit
def bn_gradient(dy, x, a, b, c):
    """The prologue of dgrad and wgrad: a batch norm's backward a * dy + b * x + c, in fp32."""
    return tl.fma(to_fp32(dy), a, affine(x, b, c))


def conv_shape(
    image: tuple[int, ...],
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> ConvShape:
    """The problem of an image [N, C, H, W] under a weight [K, C/groups, R, S]."""
    n, c, h, w = image
    k, _, r, s = weight.shape
    return ConvShape(
        n, c, h, w, k, r, s, (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]), groups
    )


def empty_nhwc(like: Tensor, *size: int) -> Tensor:
    """An activation of this size in NHWC order, of the dtype and on the device of `like`."""
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def in_pytorchs_order(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y, in NCHW order where x is NCHW and NHWC at once and PyTorch's rule, which looks at the strides, says so."""
    ambiguous = x.is_contiguous()
    if ambiguous and torch.contiguous_format == suggest_memory_format(x) == suggest_memory_format(weight):
        return y.contiguous()
    return y


def refuse_operands(x: Tensor, weight: Tensor) -> str | None:
    """Why an activation and a weight are no operands of a Triton convolution, or None."""
    reason = refuse_activations(x)
    if reason is not None:
        return reason
    if not is_nhwc(x):
        strides, shape = tuple(x.stride()), tuple(x.shape)
        return f"the Triton convolution reads NHWC (channels_last) activations, got strides {strides} for shape {shape}"
    if weight.dim() != 4:
        return f"the weight must be 4-D [K, C/groups, R, S], got {weight.dim()}-D"
    if weight.dtype != x.dtype:
        return f"weight is {name_of(weight.dtype)}, the activations are {name_of(x.dtype)}: one dtype for both"
    if weight.device != x.device:
        return f"weight is on {weight.device}, the activations on {x.device}"
    return None


def refuse_groups(weight: Tensor, inputs: int, groups: int) -> str | None:
    """Why a weight does not fit a number of input channels, or None."""
    if groups < 1 or weight.shape[0] % groups or inputs != weight.shape[1] * groups:
        return f"groups={groups} and weight {tuple(weight.shape)} do not fit {inputs} input channels"
    return None


def refuse_like(like: Tensor, shape: tuple[int, ...], **others: Tensor | None) -> str | None:
    """Why further activations are not of this shape, the dtype and device of `like`, and NHWC order, or None."""
    for name, other in others.items():
        if other is None:
            continue
        agrees = other.dtype == like.dtype and other.device == like.device and other.dim() == 4 and is_nhwc(other)
        if tuple(other.shape) != shape or not agrees:
            got = f"{name_of(other.dtype)} {tuple(other.shape)} with strides {tuple(other.stride())} on {other.device}"
            return f"{name} must be {name_of(like.dtype)} {shape} in NHWC order on {like.device}, got {got}"
    return None


def refuse_vectors(device: torch.device, size: int, **vectors: Tensor | None) -> str | None:
    """Why per-channel vectors are not contiguous ones of `size` on `device`, or None."""
    for name, vector in vectors.items():
        if vector is not None and (
            tuple(vector.shape) != (size,) or (vector.stride(0) != 1 and size > 1) or vector.device != device
        ):
            got = f"shape {tuple(vector.shape)} with strides {tuple(vector.stride())} on {vector.device}"
            return f"{name} must be a contiguous vector of {size} on {device}, got {got}"
    return None


def refuse_half(**pair: Tensor | None) -> str | None:
    """Why arguments that only come together do not, or None."""
    given = [name for name, tensor in pair.items() if tensor is not None]
    if given and len(given) < len(pair):
        return f"{', '.join(pair)} come together or not at all, got only {', '.join(given)}"
    return None


def refuse_coefficients(coefficients: Tensor, outputs: int, device: torch.device) -> str | None:
    """Why these are not the coefficients of a batch norm's backward over so many channels, or None."""
    if (
        tuple(coefficients.shape) != (3, outputs)
        or coefficients.dtype != torch.float32
        or not coefficients.is_contiguous()
        or coefficients.device != device
    ):
        got = f"{name_of(coefficients.dtype)} {list(coefficients.shape)} with strides {list(coefficients.stride())}"
        return f"dy_coefficients must be contiguous float32 [3, {outputs}] on {device}, got {got}"
    return None


def refuse_bits(name: str, mask: Tensor, like: Tensor) -> str | None:
    """Why a bit mask is not one of the elements of `like`, or None."""
    size = (like.numel() + 7) // 8
    if mask.dtype != torch.uint8 or tuple(mask.shape) != (size,) or mask.device != like.device:
        return f"{name} must be uint8 [{size}], got {mask.dtype} {list(mask.shape)} on {mask.device}"
    return None
