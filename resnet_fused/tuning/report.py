"""What a call of `tune` did, and what its table predicts for whole networks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from resnet_fused.dispatch.conv_chain import TAILS
from resnet_fused.dispatch.lookup import entry_of
from resnet_fused.dispatch.table import Choice, Problem, Table
from resnet_fused.tuning.problems import Job
from resnet_fused.tuning.work import Roofs

CHANGES_SHOWN = 40
REHEARSAL = "rehearsal on a CPU"


@dataclass(frozen=True)
class Prediction:
    """The time of a network's convolutions, batch norms and activations, from a table.

    Attributes:
        label: network, mode, batch.
        ours_ms: as the plan has it now.
        aten_ms: with native PyTorch.
        measured, parts: how many of its parts are in the table; the others count for neither.
    """

    label: str
    ours_ms: float
    aten_ms: float
    measured: int
    parts: int

    def __str__(self) -> str:
        part = "" if self.measured == self.parts else f", of the {self.measured} of {self.parts} parts known"
        gain = f"({self.aten_ms / self.ours_ms:.2f}x)" if self.ours_ms else "(nothing measured)"
        times = f"{self.ours_ms:.3f} ms as planned, {self.aten_ms:.3f} ms on native PyTorch {gain}"
        return f"predicted, {self.label}: {times}{part}"


def predict(label: str, parts: Iterable[Job], table: Table) -> Prediction:
    """Add up what a network runs.

    Args:
        label: of the prediction.
        parts: in inference every convolution and every tail that may replace some of them; in training the blocks and
            what is in none.
        table: of the times. An entry's `"aten"` is all that its other choices replace, so of a tail the saving counts.
    """
    ours = plain = 0.0
    measured = total = 0
    for job in parts:
        entry = entry_of(job.problem, table)
        tail = job.problem.op in TAILS
        total += not tail
        unfused = entry.best("aten") if entry is not None else None
        if entry is None or unfused is None:
            continue
        scale = job.weight * job.problem.batch / entry.problem.batch
        best = entry.ms(entry.winner)
        if tail:
            ours -= scale * (unfused[1] - best)
            continue
        measured += 1
        ours += scale * best
        plain += scale * unfused[1]
    return Prediction(label, ours, plain, measured, total)


@dataclass(frozen=True)
class Summary:
    """The winners of an op over all problems of it that were measured.

    Attributes:
        op: its name.
        problems: how many.
        ratio: native PyTorch's time over the winner's, the geometric mean.
        faster: in how many of them a kernel of ours won.
        roof_share: of the least time that the measured roofs allow, over the winners' times; None without roofs.
    """

    op: str
    problems: int
    ratio: float
    faster: int
    roof_share: float | None

    def __str__(self) -> str:
        share = f", {self.roof_share:.0%} of the roof" if self.roof_share is not None else ""
        of = f"faster in {self.faster} of {self.problems}"
        return f"{self.op}: {self.ratio:.2f}x of native PyTorch (geometric mean), {of}{share}"


def summarise(jobs: Iterable[Job], table: Table) -> list[Summary]:
    """A summary of each op, in the order of `jobs`; an op that stands alone in no race has none."""
    noted = table.provenance.get("roofs")
    roofs = Roofs(**noted) if noted else None
    found: dict[str, list[tuple[Job, float, float]]] = {}
    for job in jobs:
        entry = table.entries.get(job.problem)
        native = entry.best("aten") if entry is not None else None
        if entry is not None and native is not None:
            found.setdefault(job.problem.op, []).append((job, entry.ms(entry.winner), native[1]))
    summaries = []
    for op, rows in found.items():
        ratios = [native / best for _, best, native in rows]
        share = sum(roofs.least_ms(job) for job, *_ in rows) / sum(best for _, best, _ in rows) if roofs else None
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        summaries.append(Summary(op, len(rows), mean, sum(ratio > 1 for ratio in ratios), share))
    return summaries


@dataclass(frozen=True)
class TuneReport:
    """What a call of `tune` did; `str()` is a summary.

    Attributes:
        path: the table's file.
        table: all that is in it now.
        measured: problems measured by this call.
        known: problems of which the table knew every candidate already, from the same versions.
        left: problems of which candidates are left for the next call.
        changes: (problem, choice before, choice now), where they differ.
        disabled: (op, backend, why) of kernels that were not right.
        dropped: (problem, choice, why) of candidates that were not right, or did not run, in this call.
        crashed: (problem, choice, why) of candidates that crashed or hung, in any call; none is tried again.
        predictions: for each network, mode and batch.
        summaries: for each op.
    """

    path: Path
    table: Table
    measured: int = 0
    known: int = 0
    left: int = 0
    changes: list[tuple[Problem, Choice, Choice]] = field(default_factory=list)
    disabled: list[tuple[str, str, str]] = field(default_factory=list)
    dropped: list[tuple[Problem, Choice, str]] = field(default_factory=list)
    crashed: list[tuple[str, str, str]] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)

    def __str__(self) -> str:
        rehearsal = self.table.gpu == REHEARSAL
        changes = [] if rehearsal else self.changes  # who won on a CPU says nothing
        lines = [f"{problem}: {old} -> {new}" for problem, old, new in changes[:CHANGES_SHOWN]]
        if len(changes) > CHANGES_SHOWN:
            lines.append(f"... and {len(changes) - CHANGES_SHOWN} more changes")
        lines += [f"not right: {problem}: {choice}: {why}" for problem, choice, why in self.dropped[:CHANGES_SHOWN]]
        lines += [f"crashed: {problem}: {choice}: {why}" for problem, choice, why in self.crashed[:CHANGES_SHOWN]]
        lines += [f"never chosen: {op} on {backend}, because of {why}" for op, backend, why in self.disabled]
        left = f", {self.left} left for the next call" if self.left else ""
        lines.append(f"{self.measured} problems measured, {self.known} known already{left}")
        if rehearsal:
            lines.append("a rehearsal: every step ran on the CPU; its times say nothing and nothing uses its table")
        else:
            lines += [str(summary) for summary in self.summaries]
            lines += [str(prediction) for prediction in self.predictions if prediction.measured]
        return "\n".join([*lines, f"wrote {self.path}"])
