"""Which tensors the Triton kernels take: what the records' `refuse` are made of.

A dimension of size 1 may carry any stride and says nothing of the order: an activation of one channel or one pixel is
NCHW and NHWC at once. The memory-bound kernels take either order, alike in all activations of a call, and return it.
The convolutions read NHWC and return NHWC, whatever else the strides of their operands could be read as.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused.dispatch.conv import DTYPES
from resnet_fused.ops.activations import ACTIVATIONS
from resnet_fused.ops.arithmetic import is_nhwc

MAX_PRODUCTS = 2**31 // (128 * 256)  # of an int8 weight and an int8 activation less its zero, which has 9 bits


def first_line(error: Exception) -> str:
    """What a library's error says first; its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refuse_dtype(dtype: torch.dtype, taken: Sequence[torch.dtype] = DTYPES) -> str | None:
    """Why no kernel takes data of this dtype, or None."""
    return None if dtype in taken else f"the kernels take {', '.join(map(name_of, taken))}, got {name_of(dtype)}"


def refuse_activations(x: Tensor, taken: Sequence[torch.dtype] = DTYPES, /, **others: Tensor | None) -> str | None:
    """Why `x`, and the activations that must agree with it in all but values, cannot be processed, or None."""
    reason = refuse_dtype(x.dtype, taken)
    if reason is not None:
        return reason
    if x.dim() != 4:
        return f"activations are 4-D [N, C, H, W], got {x.dim()}-D"
    if not (x.is_contiguous() or is_nhwc(x)):
        strides, shape = tuple(x.stride()), tuple(x.shape)
        return f"activations must be dense in NCHW or NHWC order, got strides {strides} for shape {shape}"
    for name, other in others.items():
        if other is None:
            continue
        for what in ("shape", "dtype", "device"):
            if getattr(other, what) != getattr(x, what):
                return f"{name} has {what} {getattr(other, what)}, the others have {getattr(x, what)}"
        if not ((x.is_contiguous() and other.is_contiguous()) or (is_nhwc(x) and is_nhwc(other))):
            return (
                f"{name} has strides {tuple(other.stride())}, the others {tuple(x.stride())}: one memory order for all"
            )
    return None


def refuse_vectors(
    device: torch.device, size: int, dtype: torch.dtype | None = None, **vectors: Tensor | None
) -> str | None:
    """Why per-channel vectors are not contiguous ones of `size` (and `dtype`) on `device`, or None."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        fits = vector.shape == (size,) and vector.is_contiguous() and vector.device == device
        if not fits or (dtype is not None and vector.dtype != dtype):
            wanted = f"a contiguous {'' if dtype is None else name_of(dtype) + ' '}vector of {size} on {device}"
            got = f"{name_of(vector.dtype)} {tuple(vector.shape)} with strides {tuple(vector.stride())}"
            return f"{name} must be {wanted}, got {got} on {vector.device}"
    return None


def refuse_rows(rows: int) -> str | None:
    """Why a reduction cannot be split into so many rows, or None."""
    return None if rows >= 1 else f"a reduction needs at least one row, got rows={rows}"


def refuse_half(**pair: Tensor | None) -> str | None:
    """Why arguments that only come together do not, or None."""
    given = [name for name, tensor in pair.items() if tensor is not None]
    if given and len(given) < len(pair):
        return f"{', '.join(pair)} come together or not at all, got only {', '.join(given)}"
    return None


def refuse_bits(elements: int, device: torch.device, **masks: Tensor | None) -> str | None:
    """Why bit masks are not of so many elements, or None."""
    size = (elements + 7) // 8
    for name, mask in masks.items():
        if mask is None:
            continue
        fits = mask.shape == (size,) and mask.dtype == torch.uint8 and mask.device == device
        if not fits or not mask.is_contiguous():
            got = f"{name_of(mask.dtype)} {list(mask.shape)} with strides {list(mask.stride())} on {mask.device}"
            return f"{name} must be contiguous uint8 [{size}] on {device}, got {got}"
    return None


def refuse_nhwc(x: Tensor, taken: Sequence[torch.dtype] = DTYPES) -> str | None:
    """Why `x` is no activation that a convolution reads, or None."""
    reason = refuse_activations(x, taken)
    if reason is None and not is_nhwc(x):
        strides, shape = tuple(x.stride()), tuple(x.shape)
        return f"the Triton convolution reads NHWC (channels_last) activations, got strides {strides} for shape {shape}"
    return reason


def refuse_operands(x: Tensor, weight: Tensor, taken: Sequence[torch.dtype] = DTYPES) -> str | None:
    """Why an activation and a weight are no operands of a Triton convolution, or None."""
    reason = refuse_nhwc(x, taken)
    if reason is not None:
        return reason
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


def refuse_act(act: str | None) -> str | None:
    """Why there is no activation of this name, or None."""
    known = act is None or act in ACTIVATIONS
    return None if known else f"there is no activation {act!r}; choose one of {', '.join(ACTIVATIONS)}, or None"


def refuse_grids(dtype: torch.dtype, **grids: tuple[float, int]) -> str | None:
    """Why a result is not to be of this dtype, or these (scale, zero) say nothing of int8, or None."""
    reason = refuse_dtype(dtype, (torch.int8, *DTYPES))
    if reason is not None:
        return f"of a result {reason}"
    for name, (scale, zero) in grids.items():
        if not 0.0 < scale < float("inf"):
            return f"{name}_scale must be a number above 0, got {scale}"
        if not -128 <= zero <= 127:
            return f"{name}_zero must be a value of int8, -128 to 127, got {zero}"
    return None


def refuse_products(weight: Tensor) -> str | None:
    """Why the sums of an int8 weight [K, C/groups, R, S] may not fit int32, or None."""
    products = weight[0].numel() if weight.numel() else 0
    if products > MAX_PRODUCTS:
        return f"sums of at most {MAX_PRODUCTS} products are sure to fit int32, got {products}"
    return None


def refuse_coefficients(coefficients: Tensor | None, outputs: int, device: torch.device) -> str | None:
    """Why these are not the coefficients of a batch norm's backward over so many channels, or None."""
    if coefficients is None:
        return None
    if (
        tuple(coefficients.shape) != (3, outputs)
        or coefficients.dtype != torch.float32
        or not coefficients.is_contiguous()
        or coefficients.device != device
    ):
        got = f"{name_of(coefficients.dtype)} {list(coefficients.shape)} with strides {list(coefficients.stride())}"
        return f"dy_coefficients must be contiguous float32 [3, {outputs}] on {device}, got {got}"
    return None
