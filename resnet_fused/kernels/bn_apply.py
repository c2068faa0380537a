"""The affine map of a batch norm, with residual, ReLU and the ReLU's bit mask, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resnet_fused.kernels._launch import index_type, launch
from resnet_fused.kernels._tile import affine, mask_tile, octet_tile, octets_of, relu, round_to, to_fp32
from resnet_fused.ops.bn_apply import Args, Out


@triton.jit
def _bn_apply_kernel(
    x,  # NHWC or NCHW; so are residual and y
    scale,  # [C]
    shift,  # [C]
    residual,  # or None
    residual_scale,  # [C] or None
    residual_shift,  # [C] or None
    y,
    mask,  # one bit an element, or None
    numel,
    rows,
    octets,
    C,
    inner,
    ACTIVATE: tl.constexpr,
    CHANNEL: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OCTETS: tl.constexpr,
):
    """y = round(act(x * scale + shift + (residual_scale * residual + residual_shift))); a program owns one tile of the
    memory.
    """
    offset, valid, channel = octet_tile(numel, rows, octets, C, inner, CHANNEL, INDEX, BLOCK_ROWS, BLOCK_OCTETS)
    value = affine(tl.load(x + offset, mask=valid, other=0.0), tl.load(scale + channel), tl.load(shift + channel))
    if residual is not None:
        other = tl.load(residual + offset, mask=valid, other=0.0)
        if residual_scale is not None:
            value += affine(other, tl.load(residual_scale + channel), tl.load(residual_shift + channel))
        else:
            value += to_fp32(other)
    if ACTIVATE:
        value = relu(value)
    rounded = round_to(value, y.dtype.element_ty)
    tl.store(y + offset, rounded, mask=valid)
    if mask is not None:
        keep = valid & ((to_fp32(rounded) <= 0.0) == 0)
        bits = tl.sum(keep.to(tl.int32) << tl.arange(0, 8)[None, None, :], axis=2)
        place, exists = mask_tile(rows, octets, INDEX, BLOCK_ROWS, BLOCK_OCTETS)
        tl.store(mask + place, bits.to(tl.uint8), mask=exists)


def bn_apply(a: Args) -> Out:
    """Launch `ops.bn_apply`; bytes: one read each, one write."""
    view = octets_of(a.x)
    y = torch.empty_like(a.x)
    mask = torch.empty(triton.cdiv(a.x.numel(), 8) if a.with_mask else 0, dtype=torch.uint8, device=a.x.device)
    launch(
        _bn_apply_kernel,
        view.grid,
        a.x,
        a.scale,
        a.shift,
        a.residual,
        a.residual_scale,
        a.residual_shift,
        y,
        mask if a.with_mask else None,
        view.numel,
        view.rows,
        view.octets,
        view.channels,
        view.inner,
        ACTIVATE=a.relu,
        CHANNEL=view.channel,
        INDEX=index_type(a.x.numel()),
        BLOCK_ROWS=view.block_rows,
        BLOCK_OCTETS=view.block_octets,
    )
    return Out(y, mask)
