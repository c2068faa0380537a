"""Sums over the ranks of a process group: what a batch norm's backward needs where its statistics are those of all."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fused.functional import native


def mean_over_ranks(sums: Sequence[Tensor], total: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """The sums of all ranks over the pixels of all: divided here, on the device, as the ops take a count from the host,
    which does not know it."""
    shared = torch.stack(list(sums))
    dist.all_reduce(shared, group=group)
    first, second = shared / total
    return first, second


def moments_over(group: dist.ProcessGroup | None) -> native.Moments:
    """`(x, eps, total)` to `(mean, invstd)` of the batches of all ranks, differentiable; every rank must call. Of this
    rank's batch without a group.
    """
    return native.moments if group is None else functools.partial(_moments, group=group)


def _moments(x: Tensor, eps: float, total: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    x = x.to(total.dtype)
    mean = _SumOverRanks.apply(x.sum((0, 2, 3)), group) / total
    deviations = (x - mean.view(-1, 1, 1)).square().sum((0, 2, 3))
    return mean, (_SumOverRanks.apply(deviations, group) / total + eps).rsqrt()


class _SumOverRanks(torch.autograd.Function):
    """An all-reduce; the gradient of a sum that every rank gets is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = own.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _SumOverRanks.apply(dy, ctx.group), None
