"""A convolution that forms the statistics of what it writes and normalises what it reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.ops import bn_stats
from resnet_fused.ops.arithmetic import activation, up, vector
from resnet_fused.ops.registry import Pair, register


class Args(NamedTuple):
    x: Tensor
    weight: Tensor
    x_scale: Tensor | None
    x_shift: Tensor | None
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    rows: int


class Out(NamedTuple):
    y: Tensor
    mean: Tensor
    m2: Tensor
    count: Tensor  # type: ignore[assignment]


def reference(a: Args) -> Out:
    """y = round(conv(a, weight)), and the statistics of y as it was rounded. a = x, or with x_scale and x_shift (both
    or neither) the activation a = round(relu(x*x_scale + x_shift)) that `bn_apply` would write: the padding is zero
    *after* that map. The rows are as in `bn_stats`, over some partition of the pixels into at most `rows` parts; rows
    left over have mean = m2 = count = 0.
    """
    with torch.autocast(a.x.device.type, enabled=False):
        x = activation(a.x, a.x_scale, a.x_shift)
        y = F.conv2d(x, up(a.weight), None, a.stride, a.padding, a.dilation, a.groups).to(a.x.dtype)
    return Out(y, *bn_stats.reference(bn_stats.Args(y, a.rows)))


def fake(a: Args) -> Out:
    y = F.conv2d(a.x, a.weight, None, a.stride, a.padding, a.dilation, a.groups)
    channels = a.weight.shape[0]
    return Out(y, vector(a.x, a.rows, channels), vector(a.x, a.rows, channels), vector(a.x, a.rows))


register(__name__, kernels=("triton",))
