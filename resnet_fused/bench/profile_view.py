"""A profile as a table, and as a chart: the roofline, and a bar of where a step goes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from resnet_fused.bench import kernel_times
from resnet_fused.bench.chart import COLOURS
from resnet_fused.bench.profile import KINDS, OPTIMIZER, OTHER, CaseProfile, Profiled
from resnet_fused.bench.results import write_atomically
from resnet_fused.measure import provenance

SHADES = {
    "convolution": "#3a86c8",
    "batch norm": "#e0a030",
    "ReLU and add": "#c8553d",
    "pool": "#8f6bb3",
    "linear and loss": "#5a9a6e",
    "copies": "#6f6f6f",
    OPTIMIZER: "#b0907a",
    OTHER: "#d5d8dc",
}


def render(profiles: Sequence[CaseProfile], facts: provenance.Provenance, console: Console) -> None:
    """Print a table a case: milliseconds and the percentage of the roof, by block and by convolution."""
    for one in profiles:
        for name, reason in one.failures:
            text = f"[red]failed[/red] {escape(f'{name}: {reason} ({one.case.label})')}"
            console.print(text, highlight=False, soft_wrap=True)
        if not one.contestants:
            continue
        title = f"{one.case.model}, {one.case.label} on {provenance.device_name(facts)}: ms a step"
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("layer", no_wrap=True)
        for name in ("GFLOP", "MB, eager"):
            table.add_column(name, justify="right")
        for profiled in one.contestants:
            table.add_column(profiled.contestant.replace("-", "-\n", 1), justify="right", no_wrap=True)
            table.add_column("of roof", justify="right", no_wrap=True)
        for where, layer in one.places():
            eager = one.ops("eager", where, layer)
            moved, flops = sum(op.bytes for op in eager), sum(op.flops for op in eager)
            cells = [f"{flops / 1e9:.2f}", f"{moved / 1e6:.1f}"] if eager else ["", ""]
            for profiled in one.contestants:
                took, share = profiled.ms(where, layer), one.fraction(profiled, where, layer)
                cells += [f"{took:.2f}" if took is not None else "-", f"{share:.0%}" if share else "-"]
            name = f"  {layer.removeprefix(f'{where}.')}" if layer else where
            table.add_row(Text(name, style="" if layer else "bold"), *cells)
        table.add_section()
        for name, times in {
            "sum": [p.total_ms for p in one.contestants],
            "not profiled": [p.step_ms for p in one.contestants],
        }.items():
            table.add_row(Text(name, style="bold"), "", "", *[cell for ms in times for cell in (f"{ms:.2f}", "")])
        console.print(table)
        for profiled in (*one.contestants, *one.others):
            if profiled.kernels:
                title = f"{profiled.contestant}: what ran longest, {profiled.step_ms:.2f} ms a step"
                console.print(kernel_times.table(title, profiled.kernels))
        for profiled in one.contestants:
            parts = [f"{_name(kind, back)} {ms / profiled.total_ms:.0%}" for (kind, back), ms in kinds(profiled)]
            console.print(f"{profiled.contestant}: {', '.join(parts)}", highlight=False, soft_wrap=True)
        console.print(
            f"roof: {one.bandwidth / 1e9:.1f} GB/s copied, {one.flops_per_s / 1e9:.0f} GFLOP/s, both measured; an op's "
            "bytes by the cost model, with nothing kept in a cache: on a CPU small layers may pass 100%",
            highlight=False,
            soft_wrap=True,
        )


def kinds(profiled: Profiled) -> list[tuple[tuple[str, bool], float]]:
    """Milliseconds of each kind of work, forward and backward, in the order of the legend."""
    sums: dict[tuple[str, bool], float] = defaultdict(float)
    for piece in profiled.pieces:
        sums[piece.kind, piece.backward] += piece.ms
    order = [*dict(KINDS), OPTIMIZER, OTHER]
    return sorted(sums.items(), key=lambda item: (item[0][1], order.index(item[0][0])))


def _name(kind: str, backward: bool) -> str:
    return f"{kind} backward" if backward else kind


def save(profiles: Sequence[CaseProfile], facts: provenance.Provenance, path: Path) -> None:
    """Draw a row a case of which there is something to draw to a PNG, written atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    profiles = [one for one in profiles if one.contestants]
    if not profiles:
        raise ValueError("there is nothing to draw")
    figure = Figure(figsize=(13, 0.7 + 4.6 * len(profiles)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(profiles), 2, squeeze=False, gridspec_kw={"width_ratios": [1, 1.25]})
    for (left, right), one in zip(axes, profiles, strict=True):
        _roofline(left, one)
        _bars(right, one)
    figure.suptitle(f"{provenance.device_name(facts)}, torch {facts['torch']}, {facts['date_utc'][:10]}", fontsize=11)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def _roofline(axis: Any, one: CaseProfile) -> None:
    """A point a residual block, and the stem: operations a byte, operations a second."""
    intensities, rates = [], []
    for profiled in one.contestants:
        points = []
        for where, layer in one.places():
            ops, took = one.ops(profiled.scheme, where, layer), profiled.ms(where, layer)
            flops, moved = sum(op.flops for op in ops), sum(op.bytes for op in ops)
            if layer is None and took and flops:
                points.append((flops / moved, flops / took * 1e3))
        colour = COLOURS.get(profiled.contestant, "#5a9a6e")
        axis.scatter(*zip(*points, strict=True), s=26, color=colour, label=profiled.contestant, zorder=3)
        intensities += [x for x, _ in points]
        rates += [y for _, y in points]
    ridge = one.flops_per_s / one.bandwidth
    low, high = min([*intensities, ridge]) / 2, max([*intensities, ridge]) * 2
    line = {"color": "#b03030", "linewidth": 1.2}
    axis.plot([low, ridge, high], [low * one.bandwidth, one.flops_per_s, one.flops_per_s], **line)
    text = {"fontsize": 8, "color": "#b03030"}
    axis.text(high, one.flops_per_s * 1.08, f"{one.flops_per_s / 1e9:.0f} GFLOP/s", ha="right", va="bottom", **text)
    axis.text(low * 1.05, low * one.bandwidth * 2.2, f"{one.bandwidth / 1e9:.1f} GB/s", ha="left", va="bottom", **text)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    axis.set_ylim(min([*rates, low * one.bandwidth]) / 1.5, max([*rates, one.flops_per_s]) * 2)
    axis.set_xlabel("floating-point operations a byte (cost model)", fontsize=9)
    axis.set_ylabel("operations a second", fontsize=9)
    axis.set_title(f"{one.case.label}: a point a block", loc="left", fontsize=10, fontweight="bold")
    axis.legend(fontsize=8, loc="lower right", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def _bars(axis: Any, one: CaseProfile) -> None:
    """A bar a contestant; hatched is the backward."""
    from matplotlib.patches import Patch

    seen: dict[str, None] = {}
    for position, profiled in enumerate(one.contestants):
        left = 0.0
        for (kind, backward), ms in kinds(profiled):
            seen[kind] = None
            hatch = "///" if backward else None
            axis.barh(position, ms, left=left, color=SHADES[kind], hatch=hatch, edgecolor="white", linewidth=0.5)
            if ms > 0.06 * max(p.total_ms for p in one.contestants):
                box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
                axis.text(left + ms / 2, position, f"{ms:.1f}", ha="center", va="center", fontsize=8, bbox=box)
            left += ms
        axis.text(left, position, f" {left:.1f}", va="center", fontsize=9)
    axis.set_yticks(range(len(one.contestants)), [p.contestant for p in one.contestants], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(p.total_ms for p in one.contestants))
    axis.set_xlabel("milliseconds a step" + ("; hatched: backward" if one.case.mode == "train" else ""), fontsize=9)
    axis.set_title(f"{one.case.label}: where a step goes", loc="left", fontsize=10, fontweight="bold")
    patches = [Patch(color=shade, label=kind) for kind, shade in SHADES.items() if kind in seen]
    axis.legend(handles=patches, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
