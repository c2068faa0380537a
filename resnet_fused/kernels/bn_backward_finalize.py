"""A batch norm's backward as an affine map of its output's gradient and its input."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels._launch import launch
from resnet_fused.ops.bn_backward_finalize import Args

_BLOCK = 128


@triton.jit
def _bn_backward_finalize_kernel(
    sum_dy,  # [C]; so are the next four
    sum_dy_xhat,
    scale,
    mean,
    invstd,
    coefficients,  # [3, C]
    C,
    count,
    BLOCK: tl.constexpr,
):
    """A program owns BLOCK channels."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < C
    pixels = tl.zeros((BLOCK,), tl.float32) + count
    a = tl.load(scale + channel, mask=exists, other=0.0)
    mean_dy = tl.div_rn(tl.load(sum_dy + channel, mask=exists, other=0.0), pixels)
    mean_dy_xhat = tl.div_rn(tl.load(sum_dy_xhat + channel, mask=exists, other=0.0), pixels)
    b = -a * mean_dy_xhat * tl.load(invstd + channel, mask=exists, other=0.0)
    # b * x + c cancels where |mean| >> std. So c takes b as it was rounded, and is itself rounded once.
    c = tl.fma(-b, tl.load(mean + channel, mask=exists, other=0.0), -a * mean_dy)
    tl.store(coefficients + channel, a, mask=exists)
    tl.store(coefficients + C + channel, b, mask=exists)
    tl.store(coefficients + 2 * C + channel, c, mask=exists)


def bn_backward_finalize(a: Args) -> Tensor:
    """Launch `ops.bn_backward_finalize`.

    a = scale, b = -scale * invstd * sum_dy_xhat/count, c = -b*mean - scale * sum_dy/count

    Source:
        Ioffe, Szegedy 2015, the backward of section 3, collected by dy and x.
    """
    channels = a.sum_dy.shape[0]
    coefficients = torch.empty((3, channels), dtype=torch.float32, device=a.sum_dy.device)
    launch(
        _bn_backward_finalize_kernel,
        triton.cdiv(channels, _BLOCK),
        a.sum_dy,
        a.sum_dy_xhat,
        a.scale,
        a.mean,
        a.invstd,
        coefficients,
        channels,
        float(a.count),
        BLOCK=_BLOCK,
    )
    return coefficients
