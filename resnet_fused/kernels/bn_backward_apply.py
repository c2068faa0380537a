"""The input gradient of a batch norm, or of two whose sum a ReLU rectified, and the residual gradient, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.dispatch.conv import MAX_REGISTERS
from resnet_fused.kernels._launch import index_type, launch
from resnet_fused.kernels._tile import input_gradient, mask_tile, octet_tile, octets_of, passes_relu, round_to, to_fp32
from resnet_fused.ops import bn_backward_apply as one
from resnet_fused.ops import bn_backward_apply_join as two


@triton.jit
def _bn_backward_apply_kernel(
    dy,  # NHWC or NCHW; so are x, dx and dresidual
    x,
    mask,  # one bit an element, or None
    scale,  # [C]; so are shift, mean, invstd
    shift,
    mean,
    invstd,
    sum_dy,  # [C], or None: the statistics were constants
    sum_dy_xhat,
    count,
    shortcut,  # the input of a second batch norm behind the same mask, or None; so are its vectors, [C]
    shortcut_scale,
    shortcut_mean,
    shortcut_invstd,
    sum_dy_shortcut,
    dx,
    dresidual,  # or None
    dshortcut,  # or None
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
    """dx = scale * (dz - sum_dy / count - xhat * sum_dy_xhat / count), dshortcut likewise, dresidual = dz; a program
    owns one tile of the memory.
    """
    offset, valid, channel = octet_tile(numel, rows, octets, C, inner, CHANNEL, INDEX, BLOCK_ROWS, BLOCK_OCTETS)
    dz = to_fp32(tl.load(dy + offset, mask=valid, other=0.0))
    channel_scale = tl.load(scale + channel)
    if sum_dy is not None or (ACTIVATE and mask is None):
        value = tl.load(x + offset, mask=valid, other=0.0)
    if ACTIVATE:
        if mask is not None:
            place, exists = mask_tile(rows, octets, INDEX, BLOCK_ROWS, BLOCK_OCTETS)
            bits = tl.load(mask + place, mask=exists, other=0).to(tl.int32)
            keep = ((bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1) != 0
        else:
            keep = passes_relu(value, channel_scale, tl.load(shift + channel))
        dz = tl.where(keep, dz, 0.0)
    if dresidual is not None:
        tl.store(dresidual + offset, round_to(dz, dresidual.dtype.element_ty), mask=valid)
    if sum_dy is not None:
        mean_dy = tl.load(sum_dy + channel) / count
        mean_dy_xhat = tl.load(sum_dy_xhat + channel) / count
        gradient = input_gradient(
            dz, value, channel_scale, tl.load(mean + channel), tl.load(invstd + channel), mean_dy, mean_dy_xhat
        )
    else:
        gradient = channel_scale * dz
    tl.store(dx + offset, round_to(gradient, dx.dtype.element_ty), mask=valid)
    if shortcut is not None:
        value = tl.load(shortcut + offset, mask=valid, other=0.0)
        vectors = (
            tl.load(shortcut_scale + channel),
            tl.load(shortcut_mean + channel),
            tl.load(shortcut_invstd + channel),
        )
        gradient = input_gradient(dz, value, *vectors, mean_dy, tl.load(sum_dy_shortcut + channel) / count)
        tl.store(dshortcut + offset, round_to(gradient, dshortcut.dtype.element_ty), mask=valid)


def bn_backward_apply(a: one.Args) -> one.Out:
    """Launch `ops.bn_backward_apply`; x is read only where it is needed."""
    dx = torch.empty_like(a.x)
    dresidual = torch.empty_like(a.x) if a.with_dresidual else a.x.new_empty(0)
    norm = (a.scale, a.shift, a.mean, a.invstd, a.sum_dy, a.sum_dy_xhat)
    written = (dx, dresidual if a.with_dresidual else None, None)
    _run(a.dy, a.x, a.mask if a.relu else None, norm, a.count, (None,) * 5, written, a.relu)
    return one.Out(dx, dresidual)


def bn_backward_apply_join(a: two.Args) -> two.Out:
    """Launch `ops.bn_backward_apply_join`, which reads dy and the mask once."""
    dx, dshortcut = torch.empty_like(a.x), torch.empty_like(a.x)
    norm = (a.scale, None, a.mean, a.invstd, a.sum_dz, a.sum_dz_xhat)
    other = (a.shortcut, a.shortcut_scale, a.shortcut_mean, a.shortcut_invstd, a.sum_dz_shortcut)
    _run(a.dy, a.x, a.mask, norm, a.count, other, (dx, None, dshortcut), True)
    return two.Out(dx, dshortcut)


def _run(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    norm: tuple[Tensor | None, ...],
    count: float,
    other: tuple[Tensor | None, ...],
    results: tuple[Tensor | None, ...],
    relu: bool,
) -> None:
    """Launch the kernel.

    Args:
        norm: its operands from `scale` to `sum_dy_xhat`.
        other: from `shortcut` to `sum_dy_shortcut`.
        results: dx, dresidual and dshortcut, to be written.
    """
    view = octets_of(x)
    launch(
        _bn_backward_apply_kernel,
        view.grid,
        dy,
        x,
        mask,
        *norm,
        float(count),
        *other,
        *results,
        view.numel,
        view.rows,
        view.octets,
        view.channels,
        view.inner,
        ACTIVATE=relu,
        CHANNEL=view.channel,
        INDEX=index_type(x.numel()),
        BLOCK_ROWS=view.block_rows,
        BLOCK_OCTETS=view.block_octets,
        maxnreg=MAX_REGISTERS,
    )
