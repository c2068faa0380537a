"""The results as a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from resnet_fused.bench import loader
from resnet_fused.bench.correctness import CHECKED_IMAGES
from resnet_fused.bench.results import CaseReport, Report, Result
from resnet_fused.measure import provenance, telemetry
from resnet_fused.measure.activation_memory import EXPLANATION as SAVED
from resnet_fused.measure.memory import EXPLANATION

COLUMNS = (
    "images/s",
    "ms",
    "p20 - p80",
    "speed-up",
    "error",
    "grad error",
    "peak MB",
    "saved MB",
    "roof",
    "set-up s",
)
MODE = {"infer": "inference", "train": "training"}
ENOUGH_ROUNDS = 5  # of fewer, a 20th and an 80th percentile say nothing
BUSY_LOAD = 0.5  # a load average above this at the start means that others used the machine


def render(report: Report, console: Console) -> None:
    """Print what came out in a line a mode, a table a mode, the pictures and the provenance."""
    facts = report.provenance
    title = f"{report.model} on {provenance.device_name(facts)}, torch {facts['torch']}"
    console.print(Text(title, style="bold"), soft_wrap=True)
    for line in means(report):
        console.print(line, highlight=False)
    for mode in report.modes():
        console.print()
        console.print(_table(report, [case for case in report.cases if case.mode == mode]))
    console.print()
    for line in notes(report):
        console.print(line, highlight=False)


def _table(report: Report, cases: list[CaseReport]) -> Table:
    """The cases of one mode: a row a contestant that is there in any of them, no column without a value."""
    everywhere = unavailable(report)
    rows: list[tuple[CaseReport, str, dict[str, Text | str]]] = []
    for case in cases:
        for result in case.results:
            if result.contestant not in everywhere:
                name = f"{result.contestant}{' *' if result.contestant == report.baseline else ''}"
                rows.append((case, name, _cells(report, case, result)))
    columns = [name for name in COLUMNS if name == "images/s" or any(cells.get(name) for *_, cells in rows)]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("contestant", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for case in cases:
        table.add_section()
        table.add_row(Text(_label(case), style="bold"))
        for of, name, cells in rows:
            if of is case:
                table.add_row(name, *(cells.get(column, "") for column in columns))
    return table


def _label(case: CaseReport) -> str:
    return case.label + (f", {case.image_size} px" if case.image_size != 224 else "")


def unavailable(report: Report) -> dict[str, str]:
    """Why, by contestant, of those that run in none of the cases because they cannot run here."""
    reasons: dict[str, str] = {}
    for case in report.cases:
        reasons.update({result.contestant: str(result.reason) for result in case.results})
    seen = {r.contestant for case in report.cases for r in case.results if r.status != "unavailable"}
    return {name: reason for name, reason in reasons.items() if name not in seen}


def _cells(report: Report, case: CaseReport, result: Result) -> dict[str, Text | str]:
    """By column, where there is something to say."""
    timing, errors = result.timing, result.errors
    cells: dict[str, Text | str] = {}
    if errors:
        cells["error"] = f"{errors.logits:.1e}"
        if errors.gradients is not None:
            cells["grad error"] = f"{errors.gradients:.1e}"
    if result.setup_s is not None:
        cells["set-up s"] = f"{result.setup_s:.1f}"
    if timing is None:
        style = "yellow" if result.status == "unavailable" else "red"
        return cells | {"images/s": Text(result.status, style=style)}
    cells["images/s"] = f"{case.images_per_s(result):.1f}"
    cells["ms"] = _milliseconds(timing.p50)
    if len(timing.samples_ms) >= ENOUGH_ROUNDS:
        cells["p20 - p80"] = f"{_milliseconds(timing.p20)} - {_milliseconds(timing.p80)}"
    if (speedup := case.speedup(result, report.baseline)) is not None:
        cells["speed-up"] = speedup_text(speedup)
    if result.peak_bytes is not None:
        cells["peak MB"] = f"{result.peak_bytes / 1e6:.0f}"
    if result.saved and result.saved.bytes:
        cells["saved MB"] = f"{result.saved.bytes / 1e6:.0f}"
    if (fraction := case.roof_fraction(result)) is not None:
        cells["roof"] = f"{fraction:.0%}"
    return cells


def _milliseconds(value: float) -> str:
    """Three digits, as many as a median is good for: 1031, 915, 83.1, 8.31."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def speedup_text(speedup: float) -> Text:
    return Text(f"{speedup:.2f}x", style="green" if speedup > 1.02 else "red" if speedup < 0.98 else "")


def means(report: Report) -> Iterator[str]:
    """The summary: a line a mode, the fastest first, in rich's markup."""
    for mode in report.modes():
        total = sum(case.mode == mode for case in report.cases)
        found = report.geometric_means(mode)
        parts = [
            f"{escape(name)} {mean:.2f}x" + (f" ({count} of {total} cases)" if count < total else "")
            for name, (mean, count) in sorted(found.items(), key=lambda item: -item[1][0])
            if name != report.baseline
        ]
        what = "geometric mean" if total > 1 else "one case"
        if parts:
            yield f"[bold]speed-up over {report.baseline}, {MODE[mode]}[/bold] ({what}): {', '.join(parts)}"


def notes(report: Report) -> Iterator[str]:
    """The lines under the table, in rich's markup."""
    if missing := unavailable(report):
        parts = [f"{name}: {reason}" for name, reason in missing.items()]
        yield f"[yellow]cannot run here:[/yellow] {escape('; '.join(parts))}"
    yield from _quantised(report)
    yield from _problems(report)
    if report.kernels:
        yield escape(report.kernels)
    for line in report.left_out:
        yield f"[yellow]left out[/yellow] {escape(line)}"
    roofs = {case.dtype: case.roof_flops_per_s for case in report.cases if case.roof_flops_per_s}
    if roofs:
        parts = [f"{dtype} {r.gemm / 1e9:.0f} GEMM, {r.conv / 1e9:.0f} 3x3 convolution" for dtype, r in roofs.items()]
        yield f"roofs, the fastest arithmetic measured here, GFLOP/s: {'; '.join(parts)}"
    for case in report.cases:
        if case.conditions:
            yield escape(f"GPU in {case.label}: {telemetry.line(case.conditions)}")
    yield from map(escape, loader.lines(report.loader or ()))
    yield from picture_lines(report)
    facts = report.provenance
    load = facts["cpu"]["load_average_1min"]
    if load > BUSY_LOAD:
        yield f"[yellow]the machine was busy when this began (load average {load:.1f}): timings are noisy[/yellow]"
    yield "* the baseline: plain PyTorch in channels_last; speed-up: its median time over the contestant's"
    yield "ms: median of a step; errors: of logits and gradients relative to a float64 run of the plain model"
    yield f"peak MB: {EXPLANATION['cuda' if facts['gpu'] else 'cpu']}; set-up: build, compile and first call"
    if any(case.roof_flops_per_s for case in report.cases):
        yield "roof: the contestant's GFLOP/s, counted as for direct convolutions, over the better of the roofs above"
    if "train" in report.modes():
        yield f"saved MB: {SAVED}"


def _quantised(report: Report) -> Iterator[str]:
    """What is to be known of contestants in int8: their speed is for other numbers than the others' is."""
    right: Counter[str] = Counter()
    images: Counter[str] = Counter()
    for case in report.cases:
        for result in case.results:
            if result.agreement is not None:
                count = min(case.batch, CHECKED_IMAGES)
                images[result.contestant] += count
                right[result.contestant] += round(result.agreement * count)
    if images:
        shares = ", ".join(f"{name} on {right[name]} of {count} images" for name, count in images.items())
        yield escape(
            f"8-bit contestants ({', '.join(images)}): calibrated on random images; a larger error, and in no mean. "
            f"Top-1 as float64's: {shares}. The accuracy of trained networks: docs/int8.md"
        )


def _problems(report: Report) -> Iterator[str]:
    """One line per contestant and reason, with the cases it applies to."""
    problems: dict[tuple[str, str, str], list[str]] = {}
    missing = unavailable(report)
    for case in report.cases:
        for result in case.results:
            if result.status != "ok" and result.contestant not in missing:
                problems.setdefault((result.status, result.contestant, str(result.reason)), []).append(case.label)
    for (status, contestant, reason), labels in problems.items():
        text = f"{contestant}: {reason} ({'; '.join(labels)})"
        yield f"[red]{status}[/red] {escape(text)}"


def picture_lines(report: Report) -> Iterator[str]:
    if not report.pictures:
        return
    yield escape(
        f"pictures: {report.pictures['count']} from {report.pictures['source']}, compared with {report.baseline}"
    )
    for row in report.pictures["comparisons"]:
        head = f"  {row['contestant']}, {row['dtype']}: "
        if "problem" in row:
            yield escape(f"{head}{row['problem']}")
        else:
            yield escape(
                f"{head}top-1 agreement {row['top1_agreement']:.1%}, largest logit difference "
                f"{row['max_logit_difference']:.2e} ({row['relative_difference']:.1e} of the largest logit)"
            )
