"""Checks and times candidates on one device, in a process that may be lost: a kernel can crash it, or never end.

`Here` does it in this process. `Apart` does it in one of its own and asks it one thing at a time, each within a limit
of time, so that whoever is to blame for a loss is known; the next question starts a fresh process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from resnet_fused.plan import choice as plans
from resnet_fused.plan.choice import ALONE, BLOCK
from resnet_fused.plan.conv import ConvShape
from resnet_fused.plan.table import Choice, Problem, Table

from . import blocks
from .cases import UsageError
from .checks import check, check_all, crashed
from .harness import clock_for, first_line, time_interleaved
from .problems import Job, Operands, check_images
from .replay import captured
from .timed import operands_of, timed

START_S = 120.0  # until a process has imported PyTorch and made its context
CHECK_S = 60.0  # a check, or the first run of what is to be timed: a kernel's compilation is part of it
RACE_S = 60.0
VERIFIED_IMAGES = 16  # of the first configuration; fewer of the others, which share its code
CHECKED_IMAGES = 4


class LostError(RuntimeError):
    """The process that had the question has ended; the message says how."""


class Here:
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
            images = check_images(problem, VERIFIED_IMAGES if first else CHECKED_IMAGES)
            if ALONE in problem.flags:
                return {problem.op: check(problem.with_batch(images), problem.op, None, choice, self.device)}
            return check_all(job, choice, self.device, images)
        except Exception as error:  # what does not fit, among others
            return {problem.op: first_line(error)}

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
                call: Callable[[], object] = blocks.timed(job, choice, self._operands, table)
            else:
                call = _planned(job, choice, self._operands, self.arch, table)
            self._calls[str(choice)] = captured(call, self.device, self._pool)
        except Exception as error:  # whatever a kernel raises is its result
            return first_line(error)
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
    """`timed`; what competes with a tail runs as the table has it."""
    problem = job.problem
    if problem.op not in ("conv_chain", "conv_join"):
        return timed(job, choice, operands)

    def fprop(shape: ConvShape) -> str:
        return plans.choose(Problem("conv_fprop", shape, problem.dtype, problem.tf32), arch).backend

    def call() -> object:
        with plans.assuming(table):
            return timed(job, choice, operands, fprop)()

    return call


class Apart:
    """The same in a process of its own, begun with the first question.

    Args:
        device, arch, rounds: as of `Here`.
        serve: what the process runs.
        limits: seconds by question; more than that and the process is ended.

    Raises (from every question):
        LostError: the process crashed, or took too long.
        UsageError: it does not even start.
    """

    def __init__(
        self,
        device: torch.device,
        arch: int,
        rounds: int | None,
        serve: Callable[..., None] | None = None,
        limits: dict[str, float] | None = None,
    ) -> None:
        self._made = (str(device), arch, rounds)
        self._serve = serve or _serve
        self._limits = {"start": START_S, "check": CHECK_S, "prepare": CHECK_S, "race": RACE_S, **(limits or {})}
        self._process: Any = None
        self._pipe: Connection | None = None

    def start(self) -> None:
        """Begin the process without waiting for it."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=self._serve, args=(theirs, *self._made), daemon=True)
            self._process.start()
            theirs.close()
            self._ready = False

    def check(self, job: Job, choice: Choice, table: Table, first: bool) -> dict[str, str | None]:
        found: dict[str, str | None] = self._ask("check", job, choice, _about(job, table), first)
        return found

    def prepare(self, job: Job, choice: Choice, table: Table) -> str | None:
        reason: str | None = self._ask("prepare", job, choice, _about(job, table))
        return reason

    def race(self, budget_s: float) -> dict[str, float]:
        found: dict[str, float] = self._ask("race", budget_s)
        return found

    def close(self) -> None:
        if self._process is not None:
            assert self._pipe is not None
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = self._pipe = None

    def _ask(self, question: str, *arguments: Any) -> Any:
        self.start()
        if not self._ready:
            try:
                self._answer("start")
            except LostError as error:
                raise UsageError(f"the process that measures does not start: {error}") from None
            self._ready = True
        assert self._pipe is not None
        with contextlib.suppress(OSError):  # it has ended: `_answer` says how
            self._pipe.send((question, arguments))
        return self._answer(question)

    def _answer(self, question: str) -> Any:
        assert self._pipe is not None
        limit = self._limits[question]
        try:
            if self._pipe.poll(limit):
                raised, answer = self._pipe.recv()
                if not raised:
                    return answer
                reason = str(answer)
            else:
                reason = f"not done after {limit:g} s"
        except (EOFError, OSError):
            self._process.join(5)
            reason = f"its process ended with exit code {self._process.exitcode}"
        self.close()
        raise LostError(f"{question}: {reason}")


def _about(job: Job, table: Table) -> Table:
    """What a process must know of the table for a job: all of it for a block, else what inference would run."""
    if job.problem.op == BLOCK:
        return table
    entries = {problem: entry for problem, entry in table.entries.items() if problem.op == "conv_fprop"}
    tail = job.problem.op in ("conv_chain", "conv_join")
    versions = {"triton": table.provenance.get("triton")}
    return Table(table.gpu, table.arch, versions, table.verified, entries if tail else {})


def _serve(pipe: Connection, device: str, arch: int, rounds: int | None) -> None:
    here = Here(torch.device(device), arch, rounds)
    if device != "cpu":
        torch.zeros(1, device=device)
    pipe.send((False, None))
    with contextlib.suppress(EOFError):
        while True:
            question, arguments = pipe.recv()
            try:
                answer, raised = getattr(here, question)(*arguments), False
            except Exception as error:
                answer, raised = first_line(error), True
            reasons = answer.values() if question == "check" and not raised else [answer]
            broken = next((why for why in reasons if isinstance(why, str) and crashed(why)), None)
            pipe.send((True, broken) if broken else (raised, answer))
            if raised or broken:
                os._exit(1)  # no later answer of this process would count
