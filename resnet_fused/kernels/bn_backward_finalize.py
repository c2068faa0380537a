"""A batch norm's backward as an affine map of its output's gradient and its input."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels._launch import launch

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


def bn_backward_finalize(
    sum_dy: Tensor, sum_dy_xhat: Tensor, scale: Tensor, mean: Tensor, invstd: Tensor, count: float
) -> Tensor:
    """(a, b, c) with a*dy + b*x + c == scale * (dy - sum_dy/count - (x - mean)*invstd * sum_dy_xhat/count): what the
    prologues of the gradients of a convolution apply.

    a = scale, b = -scale * invstd * sum_dy_xhat/count, c = -b*mean - scale * sum_dy/count.

    Args:
        sum_dy: [C] fp32, contiguous, of `bn_backward_reduce` or of the data gradient; so is sum_dy_xhat.
        sum_dy_xhat: see sum_dy.
        scale: [C] fp32, contiguous, of `bn_finalize`; so are mean and invstd.
        mean: see scale.
        invstd: see scale.
        count: pixels that the sums run over.

    Returns:
        coefficients: [3, C] fp32.

    Source:
        Ioffe, Szegedy 2015, the backward of section 3, collected by dy and x.
    """
    channels = sum_dy.shape[0]
    coefficients = torch.empty((3, channels), dtype=torch.float32, device=sum_dy.device)
    launch(
        _bn_backward_finalize_kernel,
        triton.cdiv(channels, _BLOCK),
        sum_dy,
        sum_dy_xhat,
        scale,
        mean,
        invstd,
        coefficients,
        channels,
        float(count),
        BLOCK=_BLOCK,
    )
    return coefficients
