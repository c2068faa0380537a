"""What a problem's ops move and compute: the least time that a GPU's measured roofs allow for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from resnet_fused.dispatch.choice import ALONE
from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.ops import OPS
from resnet_fused.ops.operands import Operands
from resnet_fused.tuning.problems import FAMILIES, Job, arguments


@dataclasses.dataclass(frozen=True)
class Roofs:
    """What a device was measured to do at best: bytes a second of a copy, operations a second of a product."""

    bytes_per_s: float
    flops_per_s: float

    def least_ms(self, job: Job) -> float:
        """The time that a job cannot be faster than; each of its ops takes the longer of its bytes and its arithmetic.

        What a family passes on from op to op counts as often as it is written and read.
        """
        seconds = (max(moved / self.bytes_per_s, flops / self.flops_per_s) for moved, flops in work(job))
        return sum(seconds) * 1e3


def work(job: Job) -> Iterator[tuple[int, int]]:
    """(bytes of operands and results, floating-point operations) of each op of a job, from shapes alone."""
    problem, make = job.problem, Operands(torch.device("meta"), job.problem.dtype)
    if isinstance(problem.shape, ConvShape):
        yield OPS[problem.op].bytes_moved(arguments(job, make)), _flops(job)
        return
    ops = (problem.op,) if ALONE in problem.flags else FAMILIES[problem.op]
    for op in ops:
        yield OPS[op].bytes_moved(arguments(job, make, op)), 0


def _flops(job: Job) -> int:
    """A multiply-add is two."""
    s = job.problem.shape
    assert isinstance(s, ConvShape)
    inner = (s.c // s.groups) * s.r * s.s
    first, second = job.following
    if job.problem.op == "conv_join":
        inner += first  # the shortcut's 1x1
    per_pixel = s.k * inner
    if job.problem.op == "conv_chain":
        per_pixel += first * (s.k + second)
    return 2 * s.n * s.p * s.q * per_pixel
