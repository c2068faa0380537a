"""The statistics of a batch, as partial rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.ops.arithmetic import compute_dtype, vector
from resnet_fused.ops.registry import register


class Args(NamedTuple):
    x: Tensor
    rows: int


class Out(NamedTuple):
    mean: Tensor
    m2: Tensor
    count: Tensor  # type: ignore[assignment]


def reference(a: Args) -> Out:
    """[rows, C], [rows, C], [rows]: row r summarises the r-th of `rows` equal consecutive ranges of ceil(M/rows) pixels
    (the last may be short or empty): its mean, its sum of squared deviations from that mean, its number of pixels. An
    empty range gives 0, 0, 0.
    """
    x, rows = a
    # float64: an oracle must not lose digits to a mean that is large beside the deviations.
    pixels = x.double().permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    total, channels = pixels.shape
    chunk = -(-total // rows)
    starts = torch.arange(rows, device=x.device) * chunk
    count = (total - starts).clamp(0, chunk).to(pixels.dtype)
    tiles = F.pad(pixels, (0, 0, 0, rows * chunk - total)).view(rows, chunk, channels)
    inside = torch.arange(chunk, device=x.device)[None, :, None] < count[:, None, None]
    mean = torch.where(inside, tiles, 0).sum(1) / count.clamp(min=1)[:, None]
    m2 = torch.where(inside, tiles - mean[:, None], 0).square().sum(1)
    out = compute_dtype(x.dtype)
    return Out(mean.to(out), m2.to(out), count.to(out))


def fake(a: Args) -> Out:
    channels = a.x.shape[1]
    return Out(vector(a.x, a.rows, channels), vector(a.x, a.rows, channels), vector(a.x, a.rows))


register(__name__, kernels=("triton", "cuda"))
