"""A batch norm's input gradient and residual gradient, behind the ReLU's mask, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels._launch import MAX_REGISTERS, index_type, launch
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
    dx,
    dresidual,  # or None
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
    """dx = scale * (dz - sum_dy / count - xhat * sum_dy_xhat / count), dresidual = dz; a program owns one tile of the
    memory.
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
    view = octets_of(x)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if with_dresidual else x.new_empty(0)
    launch(
        _bn_backward_apply_kernel,
        view.grid,
        dy,
        x,
        mask if relu else None,
        scale,
        shift,
        mean,
        invstd,
        sum_dy,
        sum_dy_xhat,
        float(count),
        dx,
        dresidual if with_dresidual else None,
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
    return dx, dresidual
