"""Checks and times candidates on one device, in a process that may be lost: a kernel can crash it, or never end.

`LocalWorker` does it in this process. `ProcessWorker` does it in one of its own and asks it one thing at a time, each
within a limit of time, so that whoever is to blame for a loss is known; the next question starts a fresh process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from resnet_fused._command import UsageError, one_line
from resnet_fused.dispatch import choice as plans
from resnet_fused.dispatch.choice import ALONE, BLOCK
from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.dispatch.conv_chain import TAILS
from resnet_fused.dispatch.table import Choice, Problem, Table
from resnet_fused.measure import roof
from resnet_fused.measure.cases import DTYPES
from resnet_fused.measure.cuda_graph import captured
from resnet_fused.measure.timing import clock_for, time_interleaved
from resnet_fused.measure.workers import TaskFailure, Worker, WorkerCrashed
from resnet_fused.ops.operands import Operands
from resnet_fused.tuning import blocks
from resnet_fused.tuning.calls import make_benchmark_fn, operands_of
from resnet_fused.tuning.checks import check, check_all, crashed
from resnet_fused.tuning.problems import Job, check_images
from resnet_fused.tuning.work import Roofs

START_S = 120.0  # until a process has imported PyTorch and made its context
CHECK_S = 60.0  # a check, or the first run of what is to be timed: a kernel's compilation is part of it
RACE_S = ROOFS_S = 60.0
ROOF_REPEATS = 8
VERIFIED_IMAGES = 16  # of the first configuration; fewer of the others, which share its code
CHECKED_IMAGES = 4


class LocalWorker:
    """Checks and times in this process."""

    def __init__(self, device: torch.device, arch: int, rounds: int | None) -> None:
        self.device, self.arch, self.rounds = device, arch, rounds
        self._job: Job | None = None
        self._operands: Any = None
        self._calls: dict[str, Callable[[], object]] = {}
        self._pool: object | None = None
        if device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        self._clock = clock_for(device)

    def start(self) -> None:
        """Nothing to begin."""

    def check(self, job: Job, choice: Choice, table: Table, first: bool) -> dict[str, str | None]:
        """By op, why the choice is not right, or None."""
        problem = job.problem
        torch.backends.cudnn.benchmark = False  # not for float64
        try:
            if problem.op == BLOCK:
                return {BLOCK: blocks.check(job, choice, self.device, table)}
            images = check_images(problem, VERIFIED_IMAGES if first else CHECKED_IMAGES, choice, self.arch)
            if ALONE in problem.flags:
                alone = dataclasses.replace(job, problem=problem.with_batch(images))
                return {problem.op: check(alone, problem.op, choice, self.device)}
            return check_all(job, choice, self.device, images)
        except Exception as error:  # what does not fit, among others
            return {problem.op: one_line(error, kind=True)}

    def roofs(self, dtype: torch.dtype) -> Roofs:
        """What this device does at best in this dtype, measured; for int8 in bf16, which it may exceed."""
        dtype = torch.bfloat16 if dtype == torch.int8 else dtype
        repeats = ROOF_REPEATS if self.rounds is None else self.rounds
        name = next(name for name, value in DTYPES.items() if value == dtype)
        return Roofs(roof.copy_bandwidth(self.device, repeats), roof.measure(name, self.device, repeats).best)

    def prepare(self, job: Job, choice: Choice, table: Table) -> str | None:
        """Make ready to time this choice with the others of its job; why that fails, or None."""
        torch.backends.cudnn.benchmark = True  # as in every network that is timed
        try:
            if self._job != job:
                self.clear()
                make = Operands(self.device, job.problem.dtype, guarded=False)
                self._operands = blocks.operands(job, make) if job.problem.op == BLOCK else operands_of(job, make)
                self._job = job
            if job.problem.op == BLOCK:
                call: Callable[[], object] = blocks.make_benchmark_fn(job, choice, self._operands, table)
            else:
                call = _planned(job, choice, self._operands, self.arch, table)
            self._calls[str(choice)] = captured(call, self.device, self._pool)
        except Exception as error:  # whatever a kernel raises is its result
            return one_line(error, kind=True)
        return None

    def race(self, budget_s: float) -> dict[str, float]:
        """Median milliseconds of all that was prepared and not timed yet, side by side."""
        outcome = time_interleaved(
            self._calls, self._clock, rounds=self.rounds, budget_s=budget_s, warmup=0 if self.rounds else 1
        )
        self.clear()
        return {name: timing.p50 for name, timing in outcome.timings.items()}

    def clear(self) -> None:
        self._job, self._operands, self._calls = None, None, {}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        self.clear()


def _planned(job: Job, choice: Choice, operands: Any, arch: int, table: Table) -> Callable[[], object]:
    """`make_benchmark_fn`; what competes with a tail runs as the table has it."""
    problem = job.problem
    if problem.op not in TAILS:
        return make_benchmark_fn(job, choice, operands)

    def fprop(shape: ConvShape) -> str:
        op = "conv_fprop_int8" if problem.dtype == torch.int8 else "conv_fprop"
        return plans.choose(Problem(op, shape, problem.dtype, problem.tf32), arch).backend

    def call() -> object:
        with plans.assuming(table):
            return make_benchmark_fn(job, choice, operands, fprop)()

    return call


class ProcessWorker:
    """The same in a process of its own, begun with the first question.

    Args:
        device, arch, rounds: as of `LocalWorker`.
        make: what the process asks, made of these three.
        limits: seconds by question; more than that and the process is ended.

    Raises (from every question):
        WorkerCrashed: the process crashed, raised, or took too long.
        UsageError: it does not even start.
    """

    def __init__(
        self,
        device: torch.device,
        arch: int,
        rounds: int | None,
        make: Callable[..., Any] = LocalWorker,
        limits: dict[str, float] | None = None,
    ) -> None:
        self._made = (make, device, arch, rounds)
        usual = {"check": CHECK_S, "prepare": CHECK_S, "race": RACE_S, "roofs": ROOFS_S}
        self._limits = {**usual, **(limits or {})}
        self._worker: Worker | None = None

    def start(self) -> None:
        """Begin the process without waiting for it."""
        if self._worker is None:
            self._worker = Worker(*self._made, spoils=_spoils, start_s=START_S)

    def check(self, job: Job, choice: Choice, table: Table, first: bool) -> dict[str, str | None]:
        found: dict[str, str | None] = self._ask("check", job, choice, _about(job, table), first)
        return found

    def roofs(self, dtype: torch.dtype) -> Roofs:
        found: Roofs = self._ask("roofs", dtype)
        return found

    def prepare(self, job: Job, choice: Choice, table: Table) -> str | None:
        reason: str | None = self._ask("prepare", job, choice, _about(job, table))
        return reason

    def race(self, budget_s: float) -> dict[str, float]:
        found: dict[str, float] = self._ask("race", budget_s)
        return found

    def close(self) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _ask(self, question: str, *arguments: Any) -> Any:
        self.start()
        worker = self._worker
        assert worker is not None
        worker.ask(question, *arguments, limit_s=self._limits[question])
        answer = worker.answer()
        if isinstance(answer, TaskFailure) or not worker.usable:
            self.close()  # no later answer of this process would count
        if isinstance(answer, TaskFailure):
            if not worker.started:
                raise UsageError(f"the process that measures does not start: {answer.reason}")
            raise WorkerCrashed(f"{question}: {answer.reason}")
        return answer


def _spoils(answer: Any) -> bool:
    """Whether an answer tells of a GPU context that a kernel has broken."""
    reasons = answer.values() if isinstance(answer, dict) else [answer]
    return any(isinstance(why, str) and crashed(why) for why in reasons)


def _about(job: Job, table: Table) -> Table:
    """What a process must know of the table for a job: all of it for a block, else what inference would run."""
    if job.problem.op == BLOCK:
        return table
    entries = {
        problem: entry for problem, entry in table.entries.items() if problem.op in ("conv_fprop", "conv_fprop_int8")
    }
    tail = job.problem.op in TAILS
    versions = {"triton": table.provenance.get("triton")}
    return Table(table.gpu, table.arch, versions, table.verified, entries if tail else {})
