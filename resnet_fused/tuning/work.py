"""What a problem's ops move and compute: the least time that a GPU's measured roofs allow for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from resnet_fused.ops import OPS
from resnet_fused.ops.operands import Operands
from resnet_fused.tuning.problems import Job, arguments, family


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
    from torch.utils.flop_counter import conv_flop_count  # which imports triton

    make = Operands(torch.device("meta"), job.problem.dtype)
    for op in family(job.problem):
        record, given = OPS[op], arguments(job, make, op)
        flops = 0 if record.flops is None else record.flops(given, record.fake(given), conv_flop_count)
        yield record.bytes_moved(given), flops
