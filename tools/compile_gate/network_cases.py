"""The launches of whole networks, as the plan chooses them, for the Triton compile gate."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch

from resnet_fused.dispatch import BlockShape
from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.dispatch.device import assume_gpu
from resnet_fused.measure.network import networks
from resnet_fused.ops.operands import Operands
from resnet_fused.tuning.problems import Job, also, arguments, family, jobs
from tools.compile_gate.expect import TYPES, Case, Expect, op

BATCHES = (1, 32, 256)
DTYPES = (torch.bfloat16,)


def network_cases(model: str, arch: int, batches: Iterable[int] = BATCHES) -> Iterator[Case]:
    """Every op of inference and training at 224 x 224, with the configuration that the plan gives it on `arch`.

    Args:
        model: as `resnet-fused tune --model` takes it.
        arch: compute capability times ten.
        batches: sizes of the batch.
    """
    for network in networks(model, 224):
        for batch in batches:
            for dtype in DTYPES:
                for job in jobs(network, ("infer", "train"), batch, dtype, arch, False):
                    yield from _cases(job, dtype, arch)


def _cases(job: Job, dtype: torch.dtype, arch: int) -> Iterator[Case]:
    problem, make = job.problem, Operands(torch.device("meta"), dtype)
    if isinstance(problem.shape, ConvShape):
        s = problem.shape
        what = f"n{s.n} {s.c}->{s.k} {s.r}x{s.s}/{s.stride[0]} {s.h}x{s.w}"
        label = " ".join([TYPES[dtype], what, *problem.flags])
        for name in (problem.op, *also(job)):
            what = label if name == problem.op else f"{label} {name}"
            yield what, Expect(matrix=True), functools.partial(_launch, arch, name, arguments(job, make, name))
        return
    assert not isinstance(problem.shape, BlockShape)
    label = f"{TYPES[dtype]} {'x'.join(map(str, problem.shape))}"
    for name in (*family(problem), *also(job)):
        yield label, Expect(), functools.partial(_launch, arch, name, arguments(job, make, name))


def _launch(arch: int, name: str, args: tuple[object, ...]) -> object:
    with assume_gpu(arch):
        return op(name, args)
