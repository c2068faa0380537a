"""Measure every candidate of every problem of a network, and write the plan's table for this GPU.

Correctness comes first: a candidate that errs is not timed. The rest are timed side by side from a cold L2. Nothing
but this command ever measures; the plan only reads what it wrote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from resnet_fused import ops
from resnet_fused.plan import choice as plans
from resnet_fused.plan import table as tables
from resnet_fused.plan.conv import ConvShape, tf32_allowed
from resnet_fused.plan.table import Choice, Entry, Problem, Table

from . import provenance
from .candidates import backends, candidates, operands_of, timed
from .cases import DTYPES, UsageError
from .checks import REFUSED, check_all, crashed
from .harness import clock_for, time_interleaved
from .network import networks
from .problems import Job, Operands, jobs
from .progress import Silent
from .results import write_json

BUILT_IN = ("resnet50", "resnet18")
ROUNDS_S = 1.0  # at most this long for the timed rounds of a problem
SAME = ("package", "torch", "triton", "commit")  # what must agree for a table to be continued
CHANGES_SHOWN = 40
CHUNK = 24  # problems whose candidates are checked before they are timed
REHEARSAL = "rehearsal on a CPU"


@dataclass(frozen=True)
class Tuning:
    """What a call of `tune` did; `str()` is a summary.

    Attributes:
        path: the table's file.
        table: all that is in it now.
        measured: problems measured by this call.
        known: problems that were in the table already, of the same versions.
        left: problems for which no time was left; the next call goes on with them.
        changes: (problem, choice before, choice now), where they differ.
        refuted: (op, backend, why) of kernels that were not right.
        crash: what left the GPU unusable for this process; the next call leaves it out and goes on.
        dropped: (problem, choice, why) of candidates that were not right in this call.
        before_ms: of all problems as often as they occur, with what was chosen before; after_ms: now; aten_ms: with
            PyTorch's own.
    """

    path: Path
    table: Table
    measured: int = 0
    known: int = 0
    left: int = 0
    changes: list[tuple[Problem, Choice, Choice]] = field(default_factory=list)
    refuted: list[tuple[str, str, str]] = field(default_factory=list)
    dropped: list[tuple[Problem, Choice, str]] = field(default_factory=list)
    crash: str | None = None
    before_ms: float = 0.0
    after_ms: float = 0.0
    aten_ms: float = 0.0

    def __str__(self) -> str:
        lines = [f"{problem}: {old} -> {new}" for problem, old, new in self.changes[:CHANGES_SHOWN]]
        if len(self.changes) > CHANGES_SHOWN:
            lines.append(f"... and {len(self.changes) - CHANGES_SHOWN} more changes")
        lines += [f"not right: {problem}: {choice}: {why}" for problem, choice, why in self.dropped[:CHANGES_SHOWN]]
        lines += [f"never chosen: {op} on {backend}, because of {why}" for op, backend, why in self.refuted]
        left = f", {self.left} left for the next call" if self.left else ""
        lines.append(f"{self.measured} problems measured, {self.known} known already{left}")
        if self.after_ms and self.table.gpu == REHEARSAL:
            lines.append("a rehearsal: these times say nothing, and no plan reads the table")
        elif self.after_ms:
            lines.append(
                f"predicted: {self.before_ms:.3f} ms as chosen before, {self.after_ms:.3f} ms as chosen now, "
                f"{self.aten_ms:.3f} ms on PyTorch's own ({self.aten_ms / self.after_ms:.2f}x)"
            )
        if self.crash:
            lines.append(f"stopped by a crash, call again to go on without it: {self.crash}")
        return "\n".join([*lines, f"wrote {self.path}"])


def tune(
    model: str | torch.nn.Module | Iterable[str] = BUILT_IN,
    *,
    modes: Iterable[str] = ("infer", "train"),
    batch: int = 256,
    dtype: str = "bf16",
    image_size: int = 224,
    budget_s: float = math.inf,
    rehearse: bool = False,
    again: bool = False,
    path: Path | None = None,
    processes: int | None = None,
    command: str = "resnet_fused.tune()",
    reporter: Any = None,
) -> Tuning:
    """Measure what serves each op of these models best on this GPU, and write it to a table that the plan reads.

    Args:
        model: a model, a name (torchvision's, or `timm:<name>`), or several names.
        modes: `"infer"`, `"train"`.
        batch: images; a table also speaks for half and for twice as many.
        dtype: `"fp32"`, `"bf16"` or `"fp16"`.
        image_size: side of the square input.
        budget_s: begin no problem after so many seconds; calling again goes on from there.
        rehearse: run every step on a CPU, on a tiny network, into a table that no plan reads.
        again: measure also what the table knows already.
        path: the table's file; by default in the cache folder, where the plan finds it.
        processes: that compile and check candidates, while nothing is timed; by default 8, in a rehearsal 1. A script
            that calls this with more than 1 does so under `if __name__ == "__main__"`.
        command: recorded as the origin of the numbers.
        reporter: gets `start(text)` per problem and `detail(text)`.

    Returns:
        what was measured and what changed.

    Raises:
        UsageError: there is nothing to tune here, or a choice is unknown; one line.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}; choices: {', '.join(DTYPES)}")
    modes = tuple(modes)
    if not modes or set(modes) - {"infer", "train"}:
        raise UsageError(f"unknown modes {', '.join(modes) or 'none'}; choices: infer, train")
    device, arch, gpu = _where(rehearse)
    tf32 = dtype == "fp32" and tf32_allowed()
    found: dict[Problem, Job] = {}
    for network in networks(model, image_size, rehearse):
        for job in jobs(network, modes, 2 if rehearse else batch, DTYPES[dtype], arch, tf32):
            found.setdefault(job.problem, job)
    facts = provenance.collect(device, command)
    where = path or _default_path(gpu, rehearse)
    if processes is None:
        processes = 1 if rehearse else min(8, os.cpu_count() or 1)
    work = _Work(device, arch, gpu, facts, where, again, rehearse, processes, reporter or Silent())
    return work.run(sorted(found.values(), key=_order), budget_s)


def _where(rehearse: bool) -> tuple[torch.device, int, str]:
    """The device, its compute capability times ten and its name; raises UsageError where there is nothing to tune."""
    if rehearse:
        device, arch, name = torch.device("cpu"), 80, REHEARSAL
    elif torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        major, minor = torch.cuda.get_device_capability(device)
        arch, name = 10 * major + minor, torch.cuda.get_device_name(device)
    else:
        raise UsageError("nothing to tune: no CUDA GPU here; --rehearse runs every step on the CPU")
    if not backends(device):
        reasons = "; ".join(f"{name}: {ops.unavailable(name, device.type)}" for name in ("triton", "cuda"))
        raise UsageError(f"nothing to tune: PyTorch's own kernels have no competitor here ({reasons})")
    return device, arch, name


def _default_path(gpu: str, rehearse: bool) -> Path:
    folder = tables.cache_folder()
    return folder / "rehearsal" / "cpu.json" if rehearse else folder / tables.file_name(gpu)


def _order(job: Job) -> tuple[bool, float]:
    """What moves most in a step goes first; what competes with several convolutions after all of these."""
    s = job.problem.shape
    if isinstance(s, ConvShape):
        elements = s.n * (s.c * s.h * s.w + s.k * s.p * s.q)
    else:
        elements = 4 * math.prod(s)
    return job.problem.op in ("conv_chain", "conv_join"), -job.weight * elements


class _Work:
    """One call: the table as it grows, what is refuted, what changed."""

    def __init__(
        self,
        device: torch.device,
        arch: int,
        gpu: str,
        facts: dict[str, Any],
        path: Path,
        again: bool,
        rehearse: bool,
        processes: int,
        reporter: Any,
    ) -> None:
        self.processes = processes
        self.measured: set[Problem] = set()
        self.checked: dict[tuple[Problem, Choice], dict[str, str | None]] = {}
        self.device, self.arch, self.path, self.rehearse, self.reporter = device, arch, path, rehearse, reporter
        self.before = tables.read(path)
        old = self.before if self.before is not None and self._continues(self.before, facts, gpu) else None
        self.table = Table(gpu, 0 if rehearse else arch, facts) if old is None else old
        self.again = again
        refuted = self.table.provenance.get("refuted", [])
        self.refuted = {(op, backend): why for op, backend, why in refuted}
        self.dropped: list[tuple[Problem, Choice, str]] = []
        self.crashed: list[list[str]] = self.table.provenance.get("crashed", [])
        self.hung = set(self.table.provenance.get("hung", []))
        if self.table.provenance.get("attempt"):
            self.hung.add(self.table.provenance["attempt"])
        self._note(hung=sorted(self.hung), attempt=None)

    @staticmethod
    def _continues(table: Table, facts: dict[str, Any], gpu: str) -> bool:
        return table.gpu == gpu and all(table.provenance.get(name) == facts[name] for name in SAME)

    def run(self, found: list[Job], budget_s: float) -> Tuning:
        deadline = time.monotonic() + budget_s
        todo = [job for job in found if self.again or job.problem not in self.table.entries]
        crash = None
        with self._pool(todo) as pool:
            try:
                for begin in range(0, len(todo), CHUNK):
                    self._measure_some(pool, todo[begin : begin + CHUNK], deadline)
            except _CrashedError as error:
                crash = str(error)
                self._write()
        if not self.path.exists():
            self._write()
        if not self.rehearse:
            plans.forget()
        done = sum(job.problem in self.measured for job in todo)
        summary = self._summary(found, done, len(found) - len(todo), len(todo) - done)
        return dataclasses.replace(summary, crash=crash)

    def _measure_some(self, pool: ProcessPoolExecutor | None, some: list[Job], deadline: float) -> None:
        """Checked side by side, which compiles in as many processes; timed alone."""
        if time.monotonic() > deadline:
            return
        self._check_together(pool, some)
        for job in some:
            if time.monotonic() > deadline:
                return
            self.reporter.start(str(job.problem))
            self._measure(job, deadline)
            self._write()
            self.measured.add(job.problem)

    @contextlib.contextmanager
    def _pool(self, todo: list[Job]) -> Iterator[ProcessPoolExecutor | None]:
        if self.processes < 2 or not todo:
            yield None
            return
        pool = ProcessPoolExecutor(min(self.processes, len(todo)), mp_context=multiprocessing.get_context("spawn"))
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)

    def _check_together(self, pool: ProcessPoolExecutor | None, some: list[Job]) -> None:
        """Fill `checked` with what can be checked by processes of a pool."""
        self.checked.clear()
        if pool is None or not some:
            return
        pairs = [
            (job, rival)
            for job in some
            for rival in candidates(job, self.device, self.arch, quick=self.rehearse)
            if rival.backend != "aten" and _formulation(rival) == "pointer"
        ]
        self.reporter.start(f"{len(pairs)} candidates against float64")
        with contextlib.suppress(BrokenExecutor):  # a process crashed: what it left is checked one by one
            futures = {pair: pool.submit(_check_apart, *pair, self.device) for pair in pairs}
            for (job, rival), future in futures.items():
                self.checked[(job.problem, rival)] = future.result()

    def _measure(self, job: Job, deadline: float) -> None:
        problem, verified = job.problem, set()
        rivals = candidates(job, self.device, self.arch, quick=self.rehearse)
        first = {rival.backend: rival for rival in reversed(rivals)}
        right = []
        for rival in rivals:
            kernel = _formulation(rival)
            if rival.backend == "aten":
                right.append(rival)
                continue
            if kernel in self.hung or [str(problem), str(rival)] in self.crashed:
                continue
            self.reporter.detail(f"{rival} against float64")
            results = self.checked.get((problem, rival))
            if results is None:
                with self._attempt(kernel):
                    results = check_all(job, rival, self.device)
            why = next((f"{op}: {why}" for op, why in results.items() if why), None)
            if why is not None and crashed(why):
                self.crashed.append([str(problem), str(rival)])
                self._note(crashed=self.crashed)
                raise _CrashedError(f"{problem}, {rival}: {why}")
            if why is None:
                right.append(rival)
                verified |= {(op, rival.backend) for op in results}
            elif REFUSED not in why:
                self.dropped.append((problem, rival, why))
                if rival == first[rival.backend] and "OutOfMemoryError" not in why:
                    # What runs without a table is wrong: that kernel is out, and so is what was measured of it before.
                    self.refuted[(problem.op, rival.backend)] = f"{problem}: {why}"
        right = [rival for rival in right if (problem.op, rival.backend) not in self.refuted]
        operands = operands_of(job, Operands(self.device, problem.dtype, guarded=False))
        fprop = plans.default("conv_fprop", self.arch, [self.table], self.table.gpu)
        calls = {str(rival): timed(job, rival, operands, fprop) for rival in right}
        left = max(0.0, deadline - time.monotonic())
        rounds = 1 if self.rehearse else None
        outcome = time_interleaved(
            calls, clock_for(self.device), rounds=rounds, budget_s=min(ROUNDS_S, left), warmup=0 if rounds else 2
        )
        timings = {rival: outcome.timings.get(str(rival)) for rival in right}
        measured = tuple((rival, timing.p50) for rival, timing in timings.items() if timing)
        self._keep(problem, measured, verified)

    @contextlib.contextmanager
    def _attempt(self, kernel: str) -> Iterator[None]:
        """Note in the file which experimental formulation runs: one that hangs takes this process with it, and is left
        out by the next.
        """
        if kernel == "pointer":
            yield
            return
        self._note(attempt=kernel)
        self._write()
        yield
        self._note(attempt=None)

    def _note(self, **facts: Any) -> None:
        self.table = dataclasses.replace(self.table, provenance={**self.table.provenance, **facts})

    def _keep(self, problem: Problem, measured: Any, verified: set[tuple[str, str]]) -> None:
        entries = dict(self.table.entries)
        if measured:
            entries[problem] = Entry(problem, measured)
        every = {pair for pair in self.table.verified | verified if pair not in self.refuted}
        kept = {}
        for known, entry in entries.items():
            good = tuple(
                pair for pair in entry.measured if pair[0].backend == "aten" or (known.op, pair[0].backend) in every
            )
            if good:
                kept[known] = Entry(known, good)
        self._note(refuted=[[*pair, why] for pair, why in self.refuted.items()])
        self.table = dataclasses.replace(self.table, verified=frozenset(every), entries=kept)

    def _write(self) -> None:
        write_json(self.table.to_json(), self.path)

    def _summary(self, found: list[Job], done: int, known: int, left: int) -> Tuning:
        changes, before_ms, after_ms, aten_ms = [], 0.0, 0.0, 0.0
        for job in found:
            entry = self.table.entries.get(job.problem)
            if entry is None:
                continue
            times = dict(entry.measured)
            before = plans.measured(job.problem, self.before) or plans.ATEN
            now = entry.winner
            if before != now:
                changes.append((job.problem, before, now))
            after_ms += job.weight * times[now]
            aten_ms += job.weight * times.get(plans.ATEN, times[now])
            before_ms += job.weight * times.get(before, times.get(plans.ATEN, times[now]))
        refuted = [(op, backend, why) for (op, backend), why in self.refuted.items()]
        totals = (before_ms, after_ms, aten_ms)
        return Tuning(self.path, self.table, done, known, left, changes, refuted, self.dropped, None, *totals)


def _formulation(choice: Choice) -> str:
    return choice.config.kernel if choice.config else "pointer"


class _CrashedError(RuntimeError):
    """A kernel has left the CUDA context unusable."""


def _check_apart(job: Job, choice: Choice, device: torch.device) -> dict[str, str | None]:
    """`check_all` in a process of a pool, which ends with the CUDA context that a kernel has broken."""
    results = check_all(job, choice, device)
    if any(why and crashed(why) for why in results.values()):
        os._exit(1)
    return results
