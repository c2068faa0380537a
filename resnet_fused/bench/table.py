"""The results as a table for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from resnet_fused.bench import loader
from resnet_fused.bench.results import CaseReport, Report, Result
from resnet_fused.measure import provenance, telemetry
from resnet_fused.measure.activation_memory import EXPLANATION as SAVED
from resnet_fused.measure.memory import EXPLANATION

BUSY_LOAD = 0.5  # a load average above this at the start means that others used the machine


def render(report: Report, console: Console) -> None:
    """Print the table, the geometric means, the pictures and the provenance."""
    facts = report.provenance
    title = f"{report.model} on {provenance.device_name(facts)}, torch {facts['torch']}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("contestant", no_wrap=True)
    columns = ["images/s", "p50 ms", "p20 - p80", "x baseline", "logit error", "peak MB", "GFLOP/s (roof)", "set-up s"]
    training = "train" in report.modes()
    if training:
        columns.insert(5, "grad error")
        columns.insert(7, "saved MB")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for case in report.cases:
        table.add_section()
        table.add_row(Text(case.case.label, style="bold"))
        for result in case.results:
            cells = _cells(report, case, result)
            if not training:
                del cells["grad error"], cells["saved MB"]
            table.add_row(
                f"  {result.contestant}{' *' if result.contestant == report.baseline else ''}", *cells.values()
            )
    console.print(table)
    for line in notes(report):
        console.print(line, highlight=False, soft_wrap=True)


def _cells(report: Report, case: CaseReport, result: Result) -> dict[str, Text | str]:
    timing, errors = result.timing, result.errors
    status: Text | str = Text(result.status, style="yellow" if result.status == "unavailable" else "red")
    cells: dict[str, Text | str] = {"images/s": status, "p50": "", "p20 - p80": "", "x": ""}
    rate = case.flops_per_s(result)
    if timing:
        cells["images/s"] = f"{case.images_per_s(result):.1f}"
        cells["p50"] = f"{timing.p50:.2f}"
        cells["p20 - p80"] = f"{timing.p20:.2f} - {timing.p80:.2f}"
        cells["x"] = speedup_text(case.speedup(result, report.baseline))
    cells["logit error"] = f"{errors.logits:.1e}" if errors else "-"
    cells["grad error"] = f"{errors.gradients:.1e}" if errors and errors.gradients is not None else "-"
    cells["peak MB"] = f"{result.peak_bytes / 1e6:.0f}" if timing and result.peak_bytes is not None else "-"
    saved = case.saved_ratio(result, report.baseline)
    cells["saved MB"] = f"{result.saved_bytes / 1e6:.0f} ({saved:.2f}x)" if result.saved_bytes and saved else "-"
    fraction = f" ({rate / case.roof.best:.0%})" if rate and case.roof and not result.quantised else ""
    cells["rate"] = f"{rate / 1e9:.0f}{fraction}" if rate else "-"
    cells["setup"] = f"{result.setup_s:.1f}" if result.setup_s is not None else "-"
    return cells


def speedup_text(speedup: float | None) -> Text:
    if speedup is None:
        return Text("-")
    return Text(f"{speedup:.2f}x", style="green" if speedup > 1.02 else "red" if speedup < 0.98 else "")


def notes(report: Report) -> Iterator[str]:
    """The lines under the table, in rich's markup."""
    for mode in report.modes():
        total = sum(case.case.mode == mode for case in report.cases)
        means = report.geometric_means(mode)
        parts = [
            f"{escape(name)} {mean:.2f}x" + (f" ({count} of {total} cases)" if count < total else "")
            for name, (mean, count) in means.items()
            if name != report.baseline
        ]
        if parts:
            yield f"[bold]geometric mean of x baseline, {mode}:[/bold] {', '.join(parts)}"
    yield from _quantised(report)
    yield from _problems(report)
    for line in report.left_out:
        yield f"[yellow]left out[/yellow] {escape(line)}"
    roofs = {case.case.dtype: case.roof for case in report.cases if case.roof}
    if roofs:
        parts = [f"{dtype} {r.gemm / 1e9:.0f} GEMM, {r.conv / 1e9:.0f} 3x3 convolution" for dtype, r in roofs.items()]
        yield f"roof of this machine, best GFLOP/s measured: {'; '.join(parts)}"
    for case in report.cases:
        if case.conditions:
            yield escape(f"GPU in {case.case.label}: {telemetry.line(case.conditions)}")
    yield from map(escape, loader.lines(report.loader))
    yield from picture_lines(report)
    facts = report.provenance
    load = facts["cpu"]["load_average_1min"]
    if load > BUSY_LOAD:
        yield f"[yellow]the machine was busy when this began (load average {load:.1f}): timings are noisy[/yellow]"
    yield "* the baseline; errors are relative to the float64 model; roof: the better of the two above"
    yield f"peak MB: {EXPLANATION['cuda' if facts['gpu'] else 'cpu']}; set-up: build, compile and first call"
    if "train" in report.modes():
        yield f"saved MB: {SAVED}"


def _quantised(report: Report) -> Iterator[str]:
    """What is to be known of a contestant in int8: its speed is for other numbers than the others' is."""
    found: dict[str, list[str]] = {}
    for case in report.cases:
        for result in case.results:
            if result.agreement is not None:
                found.setdefault(result.contestant, []).append(f"{result.agreement:.0%} in {case.case.label}")
    for name, shares in found.items():
        yield escape(
            f"{name}: 8-bit arithmetic, calibrated on other random images; top-1 as float64: {', '.join(shares)}. "
            "Its logit error is that of 8 bits: the contract does not judge it, no mean has it. Weights are random "
            "here; docs/int8.md has the accuracy of trained networks"
        )


def _problems(report: Report) -> Iterator[str]:
    """One line per contestant and reason, with the cases it applies to."""
    problems: dict[tuple[str, str, str], list[str]] = {}
    for case in report.cases:
        for result in case.results:
            if result.status != "ok":
                problems.setdefault((result.status, result.contestant, str(result.reason)), []).append(case.case.label)
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
