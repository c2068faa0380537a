"""The search behind `tune`: what is measured in which order, what is left out, and the table as it grows."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from resnet_fused._command import write_json
from resnet_fused.dispatch import formulation
from resnet_fused.dispatch import table as tables
from resnet_fused.dispatch.choice import ALONE, ATEN, BLOCK
from resnet_fused.dispatch.conv_chain import TAILS
from resnet_fused.dispatch.lookup import measured
from resnet_fused.dispatch.table import Choice, Entry, Problem, Table
from resnet_fused.measure.workers import WorkerCrashed
from resnet_fused.tuning.candidates import candidates
from resnet_fused.tuning.checks import REFUSED, crashed
from resnet_fused.tuning.device_worker import LocalWorker, ProcessWorker
from resnet_fused.tuning.precompile import LATE_S, Precompiler
from resnet_fused.tuning.problems import Job, elements
from resnet_fused.tuning.report import TuneReport, summarise

SAME = ("package", "torch", "triton", "commit")  # what must agree for a table to be continued
# Seconds of timed rounds: of a first look, of all candidates side by side, of a block.
LOOK_S, RACE_S, BLOCK_S = 0.1, 0.4, 0.5
LOSSES = 2  # crashes or hangs, after which a formulation of an op is left out
WRITE_S = 2.0  # the table is written at most this often, and at the end


class Search:
    """One call of `tune`.

    Args:
        device, arch, gpu: where.
        facts: provenance.
        path: the table's file.
        again: measure also what it knows.
        rehearse: only what runs without a table.
        bench: checks and times.
        ahead: compiles what `bench` will be asked about.
        reporter: `expect(number)`, `start(text)`, `detail(text)`.
    """

    def __init__(
        self,
        device: torch.device,
        arch: int,
        gpu: str,
        facts: dict[str, Any],
        path: Path,
        again: bool,
        rehearse: bool,
        bench: LocalWorker | ProcessWorker,
        ahead: Precompiler,
        reporter: Any,
    ) -> None:
        self.device, self.arch, self.path, self.rehearse = device, arch, path, rehearse
        self.bench, self.ahead, self.reporter = bench, ahead, reporter
        self.before = tables.read(path)
        old = self.before if self.before is not None and continues(self.before, facts, gpu) else None
        self.table = Table(gpu, 0 if rehearse else arch, facts) if old is None else old
        noted = self.table.provenance
        self.disabled = {(op, backend): why for op, backend, why in noted.get("disabled", [])}
        self.crashed: list[tuple[str, str, str]] = [(p, c, why) for p, c, why in noted.get("crashed", [])]
        self.failed: dict[tuple[str, str], str] = {(p, c): why for p, c, why in noted.get("failed", [])}
        self.excluded: set[tuple[str, str]] = {(op, kernel) for op, kernel in noted.get("excluded", [])}
        self.losses: Counter[tuple[str, str]] = Counter()
        self.dropped: list[tuple[Problem, Choice, str]] = []
        self.right: set[tuple[Problem, Choice]] = set()  # checked, and good
        self.timed: set[Problem] = set()  # by this call
        if again:
            self.failed.clear()
        else:
            self.right = {(p, choice) for p, entry in self.table.entries.items() for choice, _ in entry.measured}
        self.again = again
        self.changes = 0  # of entries that blocks are made of
        self.seen: dict[Problem, int] = {}  # by block, how many changes there had been when it was timed
        self.written = -math.inf
        self.deadline = math.inf
        self.steps = self.done = 0  # of the reporter's

    # ---- order -------------------------------------------------------------------------------------------------------

    def run(self, ops: list[Job], whole: list[Job], budget_s: float) -> TuneReport:
        """Measure problems of ops and of whole blocks, in so many seconds."""
        self.deadline = time.monotonic() + budget_s
        ops, whole = sorted(ops, key=order), sorted(whole, key=order)
        known = [job for job in (*ops, *whole) if not self._todo(job, self.rehearse)]
        stages = [True] if self.rehearse else [True, False]
        try:
            if self._time_left() > 0:
                self.bench.start()
                for quick in stages:
                    for job in ops:
                        for choice in self._todo(job, quick):
                            self.ahead.submit(job, choice)
                self._measure_roofs(ops)
            self.steps = self._count(ops, whole, stages)
            for quick in stages:
                self._stage(ops, quick)
                self._stage(whole, quick)
        finally:
            self.ahead.close()
            self.bench.close()
            self._write()
        left = sum(bool(self._todo(job, self.rehearse)) for job in (*ops, *whole))
        return TuneReport(
            self.path,
            self.table,
            len(self.timed),
            len(known),
            left,
            self._changed([*ops, *whole]),
            [(*pair, why) for pair, why in self.disabled.items()],
            self.dropped,
            self.crashed,
            summaries=summarise(ops, self.table),
        )

    def _count(self, ops: list[Job], whole: list[Job], stages: list[bool]) -> int:
        """How many steps there are, if all candidates run and are right."""
        first = sum(bool(self._todo(job, stages[0])) for job in (*ops, *whole))
        if len(stages) == 1:
            return first
        again = sum(len(self._todo(job, False)) > len(self._todo(job, True)) for job in ops)
        return first + again + (len(whole) if again else 0)  # blocks are timed again after what they are made of

    def _measure_roofs(self, ops: list[Job]) -> None:
        """What the times are held against; a table that is continued keeps its own."""
        if "roofs" in self.table.provenance or not ops:
            return
        self.reporter.detail(f"measuring the memory and arithmetic speed of {self.device}")
        try:
            roofs = dataclasses.asdict(self.bench.roofs(ops[0].problem.dtype))
        except WorkerCrashed as error:
            self.reporter.detail(str(error))
            return
        self.table = dataclasses.replace(self.table, provenance={**self.table.provenance, "roofs": roofs})

    def _stage(self, jobs: list[Job], quick: bool) -> None:
        """Every problem that has candidates left, the next one being the first whose kernels are compiled."""
        waiting = [(job, found) for job in jobs for found in [self._todo(job, quick)] if found]
        self.steps = max(self.steps, self.done + len(waiting))
        self.reporter.expect(self.steps)
        while waiting and self._time_left() > 0:
            ready = next((pair for pair in waiting if self.ahead.ready(*pair)), waiting[0])
            waiting.remove(ready)
            job, todo = ready
            self.done += 1
            self.reporter.start(f"{job.problem}: {len(todo)} candidate{'s' * (len(todo) > 1)}")
            self.ahead.wait(job, todo, min(LATE_S, self._time_left()))
            self._measure(job, quick)

    def _candidates(self, job: Job, quick: bool) -> list[Choice]:
        return [choice for choice in candidates(job, self.device, self.arch, quick) if self._may_run(job, choice)]

    def _todo(self, job: Job, quick: bool) -> list[Choice]:
        """The candidates nobody knows the time of."""
        if self.again and job.problem not in self.timed:
            known: set[Choice] = set()
        else:
            entry = self.table.entries.get(job.problem)
            known = {choice for choice, _ in entry.measured} if entry is not None else set()
        if job.problem.op == BLOCK and self._stale(job):
            known = set()
        return [choice for choice in self._candidates(job, quick) if choice not in known]

    def _stale(self, job: Job) -> bool:
        """Whether a block was timed before what it is made of was last measured."""
        return job.problem not in self.table.entries or self.changes > self.seen.get(job.problem, 0)

    def _may_run(self, job: Job, choice: Choice) -> bool:
        problem = job.problem
        if choice == ATEN:
            return True
        names = (str(problem), str(choice))
        return not (
            names in self.failed
            or any(names == (p, c) for p, c, _ in self.crashed)
            or (problem.op, choice.backend) in self.disabled
            or (problem.op, _formulation(choice)) in self.excluded
        )

    def _time_left(self) -> float:
        return self.deadline - time.monotonic()

    # ---- one problem -------------------------------------------------------------------------------------------------

    def _measure(self, job: Job, quick: bool) -> None:
        """Check what was not checked yet, and time all that is right side by side."""
        problem, every = job.problem, candidates(job, self.device, self.arch, quick)
        first = {choice.backend: choice for choice in reversed(every)}
        right: list[Choice] = []
        for choice in every:
            if not self._may_run(job, choice):
                continue
            if choice != ATEN and ((problem, choice) not in self.right or problem.op == BLOCK):
                if self._time_left() <= 0 and right:
                    break
                if not self._check(job, choice, choice == first[choice.backend]):
                    continue
            right.append(choice)
        right = [choice for choice in right if self._may_run(job, choice)]
        seconds = BLOCK_S if problem.op == BLOCK else LOOK_S if quick else RACE_S
        times = self._race(job, right, first, min(seconds, max(0.0, self._time_left())))
        self._keep(problem, times)

    def _check(self, job: Job, choice: Choice, first: bool) -> bool:
        """Whether a candidate is right."""
        self.reporter.detail(f"{choice} against float64")
        why = self.ahead.failure(job, choice)
        results: dict[str, str | None] = {}
        if why is None:
            try:
                results = self.bench.check(job, choice, self.table, first)
            except WorkerCrashed as error:
                self._lose(job, choice, str(error), first)
                return False
            why = next((f"{op}: {reason}" for op, reason in results.items() if reason), None)
        if why is not None and crashed(why):
            self._lose(job, choice, why, first)
            return False
        if why is not None:
            self.failed[(str(job.problem), str(choice))] = why
            if REFUSED not in why:
                self.dropped.append((job.problem, choice, why))
                if first and _errs(why):
                    # What runs without a table is wrong: that kernel is out, with all that was measured of it.
                    self._refute(job.problem.op, choice.backend, f"{job.problem}: {why}")
            self._note()
            return False
        self.right.add((job.problem, choice))
        pairs = {(op, choice.backend) for op in (*results, job.problem.op)}
        self.table = dataclasses.replace(self.table, verified=self.table.verified | pairs)
        return True

    def _race(
        self, job: Job, right: list[Choice], first: dict[str, Choice], seconds: float
    ) -> tuple[tuple[Choice, float], ...]:
        """The times of the choices that run; one that is lost on the way is left out, and the rest begin again."""
        remaining = list(right)
        while remaining:
            self.reporter.detail(f"timing {len(remaining)} candidate{'s' * (len(remaining) > 1)}")
            choice: Choice | None = None
            try:
                running = []
                for choice in remaining:
                    why = self.bench.prepare(job, choice, self.table)
                    if why is not None and crashed(why):
                        raise WorkerCrashed(why)
                    if why is None:
                        running.append(choice)
                    else:
                        self.failed[(str(job.problem), str(choice))] = why
                        self.dropped.append((job.problem, choice, why))
                choice = None
                times = self.bench.race(seconds)
                return tuple((choice, times[str(choice)]) for choice in running if times.get(str(choice), 0) > 0)
            except WorkerCrashed as error:
                # Side by side nobody knows who it was: then none but native PyTorch is timed.
                blamed = [choice] if choice is not None else [one for one in remaining if one != ATEN]
                for one in blamed:
                    self._lose(job, one, str(error), one == first.get(one.backend))
                remaining = [one for one in remaining if one not in blamed] if blamed else []
        return ()

    # ---- what is known -----------------------------------------------------------------------------------------------

    def _lose(self, job: Job, choice: Choice, why: str, first: bool) -> None:
        """A candidate took its process with it: never again."""
        self.reporter.detail(f"{choice}: {why}")
        self.crashed.append((str(job.problem), str(choice), why))
        self.right.discard((job.problem, choice))
        kind = (job.problem.op, _formulation(choice))
        self.losses[kind] += 1
        if choice != ATEN and kind[1] != "pointer" and self.losses[kind] >= LOSSES:
            self.excluded.add(kind)
        if first and choice != ATEN:
            self._refute(job.problem.op, choice.backend, f"{job.problem}: {why}")
        self._note()
        self._write()

    def _refute(self, op: str, backend: str, why: str) -> None:
        self.disabled[(op, backend)] = why
        pairs = self.table.verified - {(op, backend)}
        entries = {}
        for problem, entry in self.table.entries.items():
            good = tuple(pair for pair in entry.measured if problem.op != op or pair[0].backend != backend)
            if good:
                entries[problem] = Entry(problem, good)
        self.table = dataclasses.replace(self.table, verified=pairs, entries=entries)

    def _keep(self, problem: Problem, times: tuple[tuple[Choice, float], ...]) -> None:
        """These times, and of candidates that were not in this race the older ones."""
        old = self.table.entries.get(problem)
        raced = {choice for choice, _ in times}
        kept = old.measured if old is not None and not (self.again and problem not in self.timed) else ()
        every = (*times, *(pair for pair in kept if pair[0] not in raced and problem.op != BLOCK))
        if times and (ATEN in raced or ALONE in problem.flags):  # nothing is chosen that was not compared
            entries = {**self.table.entries, problem: Entry(problem, every)}
            self.table = dataclasses.replace(self.table, entries=entries)
        self.timed.add(problem)
        if problem.op == BLOCK:
            self.seen[problem] = self.changes
        elif not isinstance(problem.shape, tuple) or ALONE in problem.flags:
            self.changes += problem.op in (*formulation.OPS, "bn_apply")
        self._note()
        if time.monotonic() - self.written > WRITE_S:
            self._write()

    def _note(self) -> None:
        facts = {
            "disabled": [[*pair, why] for pair, why in self.disabled.items()],
            "failed": [[*names, why] for names, why in self.failed.items()],
            "crashed": [list(one) for one in self.crashed],
            "excluded": [list(pair) for pair in sorted(self.excluded)],
        }
        self.table = dataclasses.replace(self.table, provenance={**self.table.provenance, **facts})

    def _write(self) -> None:
        write_json(self.table.to_json(), self.path)
        self.written = time.monotonic()

    def _changed(self, jobs: list[Job]) -> list[tuple[Problem, Choice, Choice]]:
        changes = []
        for job in jobs:
            entry = self.table.entries.get(job.problem)
            before = measured(job.problem, self.before) or ATEN
            if entry is not None and ALONE not in job.problem.flags and entry.winner != before:
                changes.append((job.problem, before, entry.winner))
        return changes


def continues(table: Table, facts: dict[str, Any], gpu: str) -> bool:
    """Whether a table was measured on this GPU with these versions."""
    return table.gpu == gpu and all(table.provenance.get(name) == facts[name] for name in SAME)


def order(job: Job) -> tuple[bool, bool, float]:
    """What moves most in a step goes first; after all that a network runs as it is what it might run instead; what
    competes with several convolutions after these.
    """
    moved = max(1, job.weight) * elements(job.problem)
    return job.problem.op in TAILS, job.weight == 0, -moved


def _formulation(choice: Choice) -> str:
    return choice.config.kernel if choice.config else "pointer"


def _errs(why: str) -> bool:
    """Whether a reason is a wrong result, and not one of the many ways not to run."""
    return "Error" not in why and "does not compile" not in why and "shared memory" not in why
