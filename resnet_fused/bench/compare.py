"""Two recorded results side by side, and today's run beside the last recorded one: ratios, with their spreads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from resnet_fused._command import UsageError
from resnet_fused.bench.results import CaseReport, Report, Result
from resnet_fused.measure import provenance
from resnet_fused.measure.cases import Case
from resnet_fused.measure.timing import Timing

OURS = ("fused", "frozen")
MARGIN = 0.02  # runs of the same code differ by so much, whatever the spread within each
NOT_SHOWN = ("date_utc", "command", "load_average_1min", "mhz")  # differ between any two runs


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A speed-up: the median, and the 20th and 80th percentile. Above 1 is faster."""

    p20: float
    p50: float
    p80: float

    def __str__(self) -> str:
        return f"{self.p50:.2f}x ({self.p20:.2f} - {self.p80:.2f})"

    @property
    def verdict(self) -> str:
        """Whether the spread lies on one side of 1."""
        return "faster" if self.p20 > 1 else "slower" if self.p80 < 1 else "same"


def paired(slow: Timing, fast: Timing) -> Ratio:
    """`slow` over `fast` round by round: what slows a whole round down cancels out.

    Both must be of one interleaved run.
    """
    ratios = np.divide(slow.samples_ms, fast.samples_ms)
    return Ratio(*(float(np.percentile(ratios, percent)) for percent in (20, 50, 80)))


def unpaired(slow: Timing, fast: Timing) -> Ratio:
    """`slow` over `fast` of different runs: the medians, and the least and most that the percentiles allow."""
    return Ratio(slow.p20 / fast.p80, slow.p50 / fast.p50, slow.p80 / fast.p20)


def against_baseline(report: CaseReport, contestant: str, baseline: str) -> Ratio | None:
    """The speed-up over the baseline within one run; None where one of them has no speed."""
    base, own = report.timing(baseline), report.timing(contestant)
    return paired(base, own) if base and own else None


@dataclasses.dataclass(frozen=True)
class Row:
    """A contestant on a case that both files have.

    Attributes:
        before, after: its results.
        ratio: how much faster it became; None where one of the two has no speed.
        relative: its speed-ups over the baseline of its own run, before and after.
    """

    label: str
    contestant: str
    before: Result
    after: Result
    batch: int
    ratio: Ratio | None
    relative: tuple[Ratio | None, Ratio | None]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Attributes:
    rows: what both have.
    provenance: (name, in the first, in the second) of what differs.
    only: what only one of them has, in words.
    same_device: whether both were measured on one kind of device.
    """

    rows: tuple[Row, ...]
    provenance: tuple[tuple[str, Any, Any], ...]
    only: tuple[str, ...]
    same_device: bool


def _key(case: Case) -> tuple[object, ...]:
    return case.model, case.mode, case.batch, case.dtype, case.image_size


def _label(case: Case) -> str:
    size = f", {case.image_size} px" if case.image_size != 224 else ""
    return f"{case.model}, {case.label}{size}"


def compare(before: Report, after: Report) -> Comparison:
    """Every contestant on every case that both reports have.

    Raises:
        UsageError: there is none.
    """
    first = {_key(report): report for report in before.cases}
    second = {_key(report): report for report in after.cases}
    rows: list[Row] = []
    only: list[str] = []
    alone: dict[tuple[str, str], list[str]] = {}  # by contestant and file: the cases
    for key in dict.fromkeys([*first, *second]):
        if key not in first or key not in second:
            label = _label((first if key in first else second)[key])
            only.append(f"only in the {'first' if key in first else 'second'}: {label}")
            continue
        old, new = first[key], second[key]
        label = _label(old)
        for name in dict.fromkeys([result.contestant for result in (*old.results, *new.results)]):
            was, now = old.result(name), new.result(name)
            if was is None or now is None:
                alone.setdefault((name, "second" if was is None else "first"), []).append(label)
                continue
            ratio = unpaired(was.timing, now.timing) if was.timing and now.timing else None
            relative = (against_baseline(old, name, before.baseline), against_baseline(new, name, after.baseline))
            rows.append(Row(label, name, was, now, old.batch, ratio, relative))
    only += [f"only in the {file}: {name} in {'; '.join(labels)}" for (name, file), labels in alone.items()]
    if not rows:
        have = [", ".join(_label(report) for report in reports.values()) for reports in (first, second)]
        raise UsageError(f"no case in common: the first has {have[0]}; the second has {have[1]}")
    devices = {provenance.device_name(report.provenance) for report in (before, after)}
    differences = tuple(_differences(before.provenance, after.provenance))
    return Comparison(tuple(rows), differences, tuple(only), len(devices) == 1)


def _differences(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            if key not in NOT_SHOWN:
                yield from _differences(before.get(key), after.get(key), f"{name}.{key}" if name else key)
    elif before != after:
        yield name, before, after


def losses(then: Report, now: Report) -> list[str]:
    """Where our contestants lost against the baseline since `then`, beyond both spreads and the margin; a line each.

    The speed-up over the baseline is taken round by round within each run, so that another clock or another user of
    the machine changes neither.
    """
    found = []
    for row in compare(then, now).rows:
        was, is_now = row.relative
        if row.contestant not in OURS or was is None:
            continue
        where = f"{row.label}: {row.contestant}"
        if is_now is None:
            found.append(f"{where} was {was}, now {row.after.status}: {row.after.reason}")
        elif is_now.p80 < was.p20 and is_now.p50 < was.p50 * (1 - MARGIN):
            found.append(f"{where} was {was}, now {is_now}")
    return found


def render(comparison: Comparison, names: tuple[str, str], console: Console) -> None:
    """Print a row a contestant, then what only one of the two has, then what differs in where they come from."""
    table = Table(title=f"A: {escape(names[0])}\nB: {escape(names[1])}", title_justify="left", title_style="bold")
    table.add_column("contestant", no_wrap=True)
    for name in ("A images/s", "B images/s", "B / A (p20 - p80)", "A speed-up", "B speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    label = None
    for row in comparison.rows:
        if row.label != label:
            label = row.label
            table.add_section()
            table.add_row(Text(label, style="bold"))
        style = {"faster": "green", "slower": "red"}.get(row.ratio.verdict, "") if row.ratio else ""
        relative = [f"{ratio.p50:.2f}x" if ratio else "-" for ratio in row.relative]
        rates = [_rate(row.before, row.batch), _rate(row.after, row.batch)]
        table.add_row(f"  {row.contestant}", *rates, Text(str(row.ratio or "-"), style=style), *relative)
    console.print(table)
    for line in comparison.only:
        console.print(escape(line), highlight=False)
    if not comparison.same_device:
        console.print("[yellow]different devices: only the speed-ups can be compared[/yellow]")
    for name, was, now in comparison.provenance:
        console.print(escape(f"differs: {name}: {was} -> {now}"), highlight=False, soft_wrap=True)
    text = "B / A above 1: B is faster, within what both spreads allow; speed-up: over each run's own baseline, the "
    text += "median of the rounds' own ratios, which noise moves less than the ratio of medians in the table of a race"
    console.print(text, highlight=False, soft_wrap=True)


def _rate(result: Result, batch: int) -> Text | str:
    if not result.timing:
        return Text(result.status, style="red" if result.status == "failed" else "yellow")
    return f"{batch / result.timing.p50 * 1e3:.1f}"
