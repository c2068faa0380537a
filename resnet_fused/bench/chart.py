"""The results as a chart: images per second of who ran, one panel per case, the arithmetic roof as a dashed line."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from resnet_fused.bench.results import CaseReport, Report, Result, write_atomically
from resnet_fused.measure import provenance

COLOURS = {
    "eager": "#b8bec6",
    "eager-channels-last": "#7d8792",
    "compile": "#e0a030",
    "fused": "#3a86c8",
    "frozen": "#1b4f8a",
    "frozen-int8": "#7a4fa0",
}


def save(report: Report, path: Path) -> None:
    """Draw the chart to a PNG, written atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = [dataclasses.replace(case, results=_ran(case) or case.results) for case in report.cases]
    heights = [len(case.results) + 1.2 for case in cases]
    figure = Figure(figsize=(10, 1.3 + 0.42 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, case in zip(axes, cases, strict=True):
        _panel(axis, case, report.baseline)
    axes[-1].set_xlabel("images per second (more is better); label: images/s, speed-up over the baseline")
    facts = report.provenance
    commit = facts.get("commit")
    where = f", commit {commit['sha'][:10]}{' + changes' if commit['dirty'] else ''}" if commit else ""
    title = (
        f"{report.model} on {provenance.device_name(facts)}\ntorch {facts['torch']}, {facts['date_utc'][:10]}{where}"
    )
    figure.suptitle(title, fontsize=11)
    source = {"Source": digest(report)}
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png", metadata=source))


def digest(report: Report) -> str:
    """Of everything in a report: what its chart carries as its source."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(report), sort_keys=True).encode()).hexdigest()


def drawn_from(path: Path) -> str | None:
    """The digest of the report that a chart was drawn from; None where there is no chart, or it does not say."""
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as picture:
        return picture.info.get("Source")


def _ran(case: CaseReport) -> tuple[Result, ...]:
    return tuple(result for result in case.results if result.timing)


def _panel(axis, case: CaseReport, baseline: str) -> None:  # type: ignore[no-untyped-def]
    rates = [case.images_per_s(result) or 0.0 for result in case.results]
    positions = range(len(rates))
    colours = [COLOURS.get(result.contestant, "#5a9a6e") for result in case.results]
    axis.barh(positions, rates, color=colours, height=0.72)
    axis.set_yticks(positions, [result.contestant for result in case.results], fontsize=9)
    axis.invert_yaxis()
    top = max([*rates, 1e-9])
    if case.roof_flops_per_s and case.flops_per_step:
        roof_rate = case.roof_flops_per_s.best / case.flops_per_step * case.batch
        if roof_rate < 3 * top:  # further away it would only squeeze the bars
            top = max(top, roof_rate)
            axis.axvline(roof_rate, color="#b03030", linestyle="--", linewidth=1)
            label = f"measured roof: {case.roof_flops_per_s.best / 1e9:.0f} GFLOP/s"
            above = axis.get_xaxis_transform()  # clear of the bars, beside the title
            axis.text(roof_rate, 1.01, label, fontsize=7, color="#b03030", ha="left", va="bottom", transform=above)
    for position, (rate, result) in enumerate(zip(rates, case.results, strict=True)):
        axis.text(rate + 0.01 * top, position, _label(case, result, rate, baseline), va="center", fontsize=9)
    axis.set_xlim(0, top * 1.22)
    axis.set_title(case.label, loc="left", fontsize=10, fontweight="bold")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", labelsize=8)


def _label(case: CaseReport, result: Result, rate: float, baseline: str) -> str:
    if not result.timing:
        return f"{result.status}"
    speedup = case.speedup(result, baseline)
    return f"{rate:.1f}" + (f"   {speedup:.2f}x" if speedup and result.contestant != baseline else "   baseline")
