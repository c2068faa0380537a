"""The input gradient of a batch norm, or of two whose sum a ReLU rectified, and the residual gradient, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.dispatch.conv import MAX_REGISTERS
from resnet_fused.kernels._launch import index_type, launch
from resnet_fused.kernels._tile import input_gradient, mask_tile, octet_tile, octets_of, passes_relu, round_to, to_fp32


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


def bn_backward_apply(
    dy: Tensor,
    x: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    invstd: Tensor,
    sum_dy: Tensor | None,
    sum_dy_xhat: Tensor | None,
    count: float,
    relu: bool,
    with_dresidual: bool,
) -> tuple[Tensor, Tensor]:
    """dx = scale * (dz - sum_dy / count - (x - mean) * invstd * sum_dy_xhat / count), dz = dy where the ReLU passed it,
    else 0.

    Args:
        dy: like x.
        x: [N, C, H, W], the batch norm's input, dense in NCHW or NHWC order; read only where it is needed.
        mask: bits from `bn_apply`; None recomputes them from x.
        scale: [C] fp32; so are shift, mean and invstd.
        shift: see scale.
        mean: see scale.
        invstd: see scale.
        sum_dy: [C] fp32, or None (with sum_dy_xhat) where the statistics were constants: dx = scale * dz.
        sum_dy_xhat: see sum_dy.
        count: pixels behind the sums.
        relu: without it dz = dy.
        with_dresidual: whether to return dz.

    Returns:
        dx: like x.
        dresidual: dz, like x, or empty.
    """
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if with_dresidual else x.new_empty(0)
    norm = (scale, shift, mean, invstd, sum_dy, sum_dy_xhat)
    _run(
        dy, x, mask if relu else None, norm, count, (None,) * 5, (dx, dresidual if with_dresidual else None, None), relu
    )
    return dx, dresidual


def bn_backward_apply_join(
    dy: Tensor,
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    mean: Tensor,
    invstd: Tensor,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    shortcut: Tensor,
    shortcut_scale: Tensor,
    shortcut_mean: Tensor,
    shortcut_invstd: Tensor,
    sum_dz_shortcut: Tensor,
    count: float,
) -> tuple[Tensor, Tensor]:
    """`bn_backward_apply` of both batch norms whose sum, rectified, ended a block, which reads dy and the mask once.

    Args:
        dy: like x; so is shortcut.
        x: [N, C, H, W], what the branch's batch norm normalised, dense in NCHW or NHWC order.
        mask: bits from `bn_apply`.
        scale: [C] fp32; so are all other vectors.
        mean: see scale.
        invstd: see scale.
        sum_dz: of dz = mask ? dy : 0, as `conv_dgrad_join` gives it; so are sum_dz_xhat and sum_dz_shortcut.
        sum_dz_xhat: see sum_dz.
        shortcut: what the projection's batch norm normalised.
        shortcut_scale: see scale.
        shortcut_mean: see scale.
        shortcut_invstd: see scale.
        sum_dz_shortcut: see sum_dz.
        count: pixels behind the sums.

    Returns:
        dx, dshortcut: like x.
    """
    dx, dshortcut = torch.empty_like(x), torch.empty_like(x)
    norm = (scale, None, mean, invstd, sum_dz, sum_dz_xhat)
    other = (shortcut, shortcut_scale, shortcut_mean, shortcut_invstd, sum_dz_shortcut)
    _run(dy, x, mask, norm, count, other, (dx, None, dshortcut), True)
    return dx, dshortcut


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
