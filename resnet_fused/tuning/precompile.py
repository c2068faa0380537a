"""Kernels compiled by other processes before anybody runs them, into the cache that Triton keeps on disk.

A launcher runs on tensors without memory, its launches are noted, and each kernel is compiled as Triton's JIT would
compile it for the GPU: the JIT then finds it in the cache. No process here touches the GPU, so that what is timed
meanwhile has it for itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import time
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, wait
from concurrent.futures import TimeoutError as Late
from typing import Any

import torch

from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.dispatch.device import assume_gpu
from resnet_fused.dispatch.table import Choice
from resnet_fused.ops.operands import Operands
from resnet_fused.tuning.device_worker import CHECKED_IMAGES
from resnet_fused.tuning.launches import SHARED_MEMORY_KB, recording
from resnet_fused.tuning.problems import (
    Job,
    also,
    arguments,
    check_images,
    family,
)

SPARE_CORES = 2  # for the process that times, and the one that asks it
LATE_S = 60.0  # a kernel that takes longer is compiled where it is run, within that process's limit


class Precompiler:
    """Compiles candidates in the order in which they are handed over.

    Args:
        arch: compute capability times ten.
        processes: how many; 0 compiles nothing.
    """

    def __init__(self, arch: int, processes: int) -> None:
        self.arch = arch
        self._futures: dict[Any, Future[str | None]] = {}
        self._pool = None
        if processes > 0:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(arch,))

    def submit(self, job: Job, choice: Choice) -> None:
        """Compile what a candidate launches; one that launches the same kernels as another before counts as that."""
        key = _alike(job, choice)
        if self._pool is None or choice.backend != "triton" or key in self._futures:
            return
        with contextlib.suppress(BrokenExecutor, RuntimeError):
            self._futures[key] = self._pool.submit(compile_candidate, job, choice, self.arch)

    def ready(self, job: Job, choices: list[Choice]) -> bool:
        """Whether nothing of this is being compiled or waits for it."""
        return all(future.done() for future in self._of(job, choices))

    def wait(self, job: Job, choices: list[Choice], limit_s: float = LATE_S) -> None:
        """Until all of it is compiled, or that is late."""
        wait(self._of(job, choices), timeout=max(0.0, limit_s))

    def failure(self, job: Job, choice: Choice) -> str | None:
        """Why a candidate does not compile, or None: it does, or nobody knows yet."""
        future = self._futures.get(_alike(job, choice))
        if future is None or not future.done() or future.cancelled():
            return None
        try:
            return future.result(0)
        except (Exception, Late):  # a process that died: the kernel may have nothing to do with it
            return None

    def close(self) -> None:
        """Give up what is not compiled yet."""
        if self._pool is not None:
            processes = list((self._pool._processes or {}).values())
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.kill()
            self._pool = None

    def _of(self, job: Job, choices: list[Choice]) -> list[Future[str | None]]:
        found = (self._futures.get(_alike(job, choice)) for choice in choices)
        return [future for future in found if future is not None]


def _alike(job: Job, choice: Choice) -> tuple[Any, ...]:
    """What most often decides which kernels a candidate launches. Where it does not, the one that runs it compiles."""
    problem, config = job.problem, choice.config
    shape: Any = problem.shape
    if isinstance(shape, ConvShape):
        channels = [shape.c // shape.groups, shape.k // shape.groups, *job.following]
        divides = [c % max(config.block_k, config.block_n) == 0 for c in channels] if config else channels
        shape = (shape.r, shape.s, shape.padding, shape.stride == (1, 1), shape.n == 1, *divides, channels[0] % 16)
        shape += (tuple(channels),) if problem.op == "conv_chain" or channels[0] < 64 else ()
    config = config and dataclasses.replace(config, splits=min(config.splits, 2))
    return problem.op, shape, problem.dtype, problem.flags, job.residual, job.epilogue, config


def _begin(arch: int) -> None:
    with contextlib.suppress(OSError):
        os.nice(10)
    as_if_on(arch)


def as_if_on(arch: int) -> None:
    """Make Triton compile for an architecture in this process, which never launches anything."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Target:
        """As much of a driver as compiling asks for."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", arch, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_device_interface(self) -> Any:
            raise RuntimeError("no GPU here")

    triton.runtime.driver.set_active(Target())


def compile_candidate(job: Job, choice: Choice, arch: int) -> str | None:
    """Compile what a candidate launches, where it is checked and where it is timed; why that fails, or None."""
    images = check_images(job.problem, CHECKED_IMAGES, choice, arch)
    small = dataclasses.replace(job, problem=job.problem.with_batch(images))
    return _compile(job, choice, arch) or _compile(small, choice, arch)


def _compile(job: Job, choice: Choice, arch: int) -> str | None:
    from resnet_fused import kernels

    problem = job.problem
    make = Operands(torch.device("meta"), problem.dtype)
    start = time.monotonic()
    try:
        for op in (*family(problem), *also(job)):
            given = arguments(job, make, op)
            with recording() as launches, assume_gpu(arch):
                kernels.run(op, given, choice.config)
            for kernel, _, launched, named in launches:
                compiled = kernel.warmup(*launched, grid=(1,), **named)
                shared, limit = compiled.metadata.shared, 1024 * SHARED_MEMORY_KB.get(arch, 227)
                if shared > limit:
                    return f"{shared} bytes of shared memory, sm_{arch} has {limit}"
                if time.monotonic() - start > LATE_S:
                    return f"not compiled after {LATE_S:g} s"
    except Exception as error:  # whatever the compiler raises is the finding
        return f"does not compile: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"
    return None
