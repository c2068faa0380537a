"""A convolution's weight as the implicit matrix product wants it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels._launch import index_type, launch
from resnet_fused.ops.pack_weight import Args

_BLOCK = 1024


@triton.jit
def _pack_weight_kernel(
    weight,  # [outer, R, S, inner] through the strides that follow
    packed,  # contiguous [outer, R, S, inner]
    stride_outer,
    stride_r,
    stride_s,
    stride_inner,
    numel,
    R,
    S,
    inner,
    FLIP: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """packed[o, r, s, i] = weight[o, r, s, i], or of the taps turned by 180 degrees; a program owns BLOCK consecutive
    elements of packed.
    """
    place = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    i = place % inner
    tap = place // inner
    s = tap % S
    r = (tap // S) % R
    o = tap // (S * R)
    if FLIP:
        r = R - 1 - r
        s = S - 1 - s
    offset = o * stride_outer + r * stride_r + s * stride_s + i * stride_inner
    tl.store(packed + place, tl.load(weight + offset, mask=place < numel), mask=place < numel)


def pack_weight(a: Args) -> Tensor:
    """Launch `ops.pack_weight`."""
    weight = a.weight
    k, c, r, s = weight.shape
    stride_k, stride_c, stride_r, stride_s = weight.stride()
    outer, inner, stride_outer, stride_inner = (c, k, stride_c, stride_k) if a.flip else (k, c, stride_k, stride_c)
    packed = weight.new_empty((outer, r, s, inner))
    launch(
        _pack_weight_kernel,
        triton.cdiv(weight.numel(), _BLOCK),
        weight,
        packed,
        stride_outer,
        stride_r,
        stride_s,
        stride_inner,
        weight.numel(),
        r,
        s,
        inner,
        FLIP=a.flip,
        INDEX=index_type(
            weight.numel(),
            sum(abs(step) * (size - 1) for step, size in zip(weight.stride(), weight.shape, strict=True)),
        ),
        BLOCK=_BLOCK,
    )
    return packed
