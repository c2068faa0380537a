"""The statistics of a batch, as partial rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.dispatch.heuristics import partial_rows
from resnet_fused.ops import comparison
from resnet_fused.ops.arithmetic import compute_dtype, vector
from resnet_fused.ops.comparison import Comparison
from resnet_fused.ops.operands import Operands
from resnet_fused.ops.refusals import refuse_activations, refuse_rows
from resnet_fused.ops.registry import Size, register


class Args(NamedTuple):
    x: Tensor  # [N, C, H, W]
    rows: int  # how many ranges of pixels


class Out(NamedTuple):
    mean: Tensor
    m2: Tensor
    count: Tensor  # type: ignore[assignment]


def reference(a: Args) -> Out:
    """[rows, C], [rows, C], [rows]: row r summarises the r-th of `rows` equal consecutive ranges of ceil(M/rows) pixels
    (the last may be short or empty): its mean (fp64), its sum of squared deviations from that mean, its number of
    pixels. An empty range gives 0, 0, 0.
    """
    x, rows = a
    # float64, and so the mean: else a mean that is large beside the deviations loses the digits that they are made of.
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
    return Out(mean, m2.to(out), count.to(out))


def fake(a: Args) -> Out:
    channels = a.x.shape[1]
    mean = a.x.new_empty((a.rows, channels), dtype=torch.float64)
    return Out(mean, vector(a.x, a.rows, channels), vector(a.x, a.rows))


def refuse(a: Args) -> str | None:
    return refuse_activations(a.x) or refuse_rows(a.rows)


def case(make: Operands, size: Size, rows: int | None = None) -> Args:
    return Args(make.activation(*size), rows or partial_rows(size[0] * size[2] * size[3], size[1]))


def compare(a: Args, actual: Out, plain: Out, truth: Out) -> list[Comparison]:
    return comparison.statistics(a.x, actual)


register(__name__, triton="bn_stats", cuda=True, cpu=True)
