"""What this project set out to reach on a GPU, and what the recorded results say was reached."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Iterator, Sequence

from resnet_fused.bench.contestants import BASELINE
from resnet_fused.bench.results import CaseReport, Report, Result
from resnet_fused.measure import provenance

MODEL, DTYPE, IMAGE_SIZE = "resnet50", "bf16", 224
NOT_MEASURED = "not measured"


@dataclasses.dataclass(frozen=True)
class Target:
    """A ratio to reach on ResNet-50 in bf16, 224 pixels.

    Attributes:
        text: what it is.
        mode, batch: of the case.
        ours, theirs: contestants.
        floor, goal: times; of memory, below it is better.
        images_per_s: that go with the goal, on an H100; None where none was named.
        memory: peak memory, ours over theirs; otherwise images per second.
    """

    text: str
    mode: str
    batch: int
    ours: str
    theirs: str
    floor: float
    goal: float
    images_per_s: float | None = None
    memory: bool = False


TARGETS = (
    Target("training, batch 256, against eager AMP", "train", 256, "fused", BASELINE, 1.7, 2.5, 7_000),
    Target(
        "training, batch 256, against torch.compile max-autotune",
        "train",
        256,
        "fused",
        "compile-max-autotune",
        1.25,
        1.8,
    ),
    Target("training, batch 256: peak memory against eager", "train", 256, "fused", BASELINE, 0.75, 0.6, memory=True),
    Target(
        "inference, batch 256, against torch.compile max-autotune with freezing",
        "infer",
        256,
        "frozen",
        "compile-max-autotune",
        1.25,
        1.6,
        36_000,
    ),
    Target(
        "inference, batch 1: latency against torch.compile reduce-overhead", "infer", 1, "frozen", "compile", 1.2, 2.0
    ),
)


@dataclasses.dataclass(frozen=True)
class Reached:
    """Attributes:
    ratio: as the target's.
    images_per_s: ours.
    across: whether the two ran in different runs, each beside the baseline: the ratio is that of their speed-ups.
    """

    ratio: float
    images_per_s: float
    across: bool

    def verdict(self, target: Target) -> str:
        good = (lambda bound: self.ratio <= bound) if target.memory else (lambda bound: self.ratio >= bound)
        return "goal" if good(target.goal) else "floor" if good(target.floor) else "missed"


def forced(report: Report) -> bool:
    """Whether a backend was forced: that says nothing about what a user gets."""
    return "--backend" in shlex.split(report.provenance["command"])


def reached(target: Target, reports: Iterable[Report]) -> Reached | None:
    """What these reports of one device say, the last ones first; None where the case or a contestant is missing."""
    cases = [case for report in reports if not forced(report) for case in report.cases if _is(target, case)]
    cases.reverse()
    for case in cases:
        ours, theirs = _of(case, target.ours), _of(case, target.theirs)
        if ours and theirs:
            return _reached(target, case, ours, _ratio(target, ours, theirs), False)
    own = next((case for case in cases if _of(case, target.ours) and _of(case, BASELINE)), None)
    other = next((case for case in cases if _of(case, target.theirs) and _of(case, BASELINE)), None)
    if own is None or other is None:
        return None
    pairs = [(_of(case, name), _of(case, BASELINE)) for case, name in ((own, target.ours), (other, target.theirs))]
    first, second = (_ratio(target, a, b) if a and b else None for a, b in pairs)
    ours = _of(own, target.ours)
    return _reached(target, own, ours, first / second, True) if ours and first and second else None


def _reached(target: Target, case: CaseReport, ours: Result, ratio: float | None, across: bool) -> Reached | None:
    rate = case.images_per_s(ours)
    return Reached(ratio, rate, across) if ratio and rate else None


def _ratio(target: Target, ours: Result, theirs: Result) -> float | None:
    if target.memory:
        return ours.peak_bytes / theirs.peak_bytes if ours.peak_bytes and theirs.peak_bytes else None
    return theirs.timing.p50 / ours.timing.p50 if theirs.timing and ours.timing else None


def _is(target: Target, case: CaseReport) -> bool:
    what = (case.model, case.mode, case.batch, case.dtype, case.image_size)
    return what == (MODEL, target.mode, target.batch, DTYPE, IMAGE_SIZE)


def _of(case: CaseReport, contestant: str) -> Result | None:
    return next((r for r in case.results if r.contestant == contestant and r.timing), None)


def rows(reports: Sequence[Report]) -> Iterator[tuple[str, str, str, str]]:
    """(what, floor, goal, reached) of every target, from the results of one GPU."""
    for target in TARGETS:
        found = reached(target, reports)
        rate = f" ({target.images_per_s:,.0f} images/s)" if target.images_per_s else ""
        text = _text(target, found) if found else NOT_MEASURED
        yield target.text, f"{target.floor:g}x", f"{target.goal:g}x{rate}", text


def _text(target: Target, found: Reached) -> str:
    across = ", across two runs by the baseline" if found.across else ""
    rate = "" if target.memory else f", {found.images_per_s:,.0f} images/s"
    return f"{found.ratio:.2f}x{rate}: {found.verdict(target)}{across}"


def by_gpu(reports: Iterable[Report]) -> dict[str, list[Report]]:
    """The reports of GPUs, by the GPU's name, oldest first."""
    found: dict[str, list[Report]] = {}
    for report in sorted(reports, key=lambda report: report.provenance["date_utc"]):
        if report.provenance["gpu"]:
            found.setdefault(provenance.device_name(report.provenance), []).append(report)
    return found


def markdown(reports: Iterable[Report]) -> Iterator[str]:
    """The table of a page, a column a GPU."""
    columns = by_gpu(reports) or {"reached": []}
    cells = [list(rows(found)) for found in columns.values()]
    yield f"| ResNet-50, bf16, 224 | floor | goal | {' | '.join(columns)} |"
    yield "|---|--:|--:|" + "---|" * len(columns)
    for line in zip(*cells, strict=True):
        yield f"| {' | '.join(line[0][:3])} | {' | '.join(one[3] for one in line)} |"


def lines(reports: Sequence[Report]) -> Iterator[str]:
    """The same for a terminal, of one GPU."""
    table = [("goal", "floor", "goal", "reached"), *rows(reports)]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
