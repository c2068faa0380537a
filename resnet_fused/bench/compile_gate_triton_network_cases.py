"""The launches of whole networks, as the plan chooses them, for the Triton compile gate."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterable, Iterator

import torch

from resnet_fused.plan import BlockShape
from resnet_fused.plan.conv import ConvShape

from .compile_gate_triton_expect import TYPES, Case, Expect, op
from .network import networks
from .problems import FAMILIES, Job, Shapes, also, arguments, jobs, join_arguments, memory_arguments

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
    problem, make = job.problem, Shapes(dtype)
    if isinstance(problem.shape, ConvShape):
        s = problem.shape
        what = f"n{s.n} {s.c}->{s.k} {s.r}x{s.s}/{s.stride[0]} {s.h}x{s.w}"
        label = " ".join([TYPES[dtype], what, *problem.flags])
        given = arguments(job, make)
        yield label, Expect(matrix=True), functools.partial(_launch, arch, problem.op, given)
        for name in also(job):
            yield (
                f"{label} join",
                Expect(matrix=True),
                functools.partial(_launch, arch, name, join_arguments(given, make)),
            )
        return
    assert not isinstance(problem.shape, BlockShape)
    label = f"{TYPES[dtype]} {'x'.join(map(str, problem.shape))}"
    for name in FAMILIES[problem.op]:
        yield label, Expect(), functools.partial(_launch, arch, name, memory_arguments(name, problem, make))


def _launch(arch: int, name: str, args: tuple[object, ...]) -> object:
    with _as_if_on(arch):
        return op(name, *args)


@contextlib.contextmanager
def _as_if_on(arch: int) -> Iterator[None]:
    """Launchers ask for configurations of `arch`."""
    asked = "compute_capability"
    modules = [m for n, m in sys.modules.items() if n.startswith("resnet_fused.kernels.") and hasattr(m, asked)]
    before = [getattr(module, asked) for module in modules]
    for module in modules:
        setattr(module, asked, lambda device: arch)
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            setattr(module, asked, function)
