"""The charts of `degradation.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

STYLE = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6e8",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}
DEPTH_COLOURS = ("#e0a030", "#5a9a6e", "#3a86c8", "#7a3b8f", "#b03030", "#303840")
FAMILY_COLOURS = {"plain": "#c0504d", "residual": "#1b4f8a"}


def draw(recorded: dict[str, Any], folder: Path) -> list[Path]:
    """Draw a chart of every part that was recorded; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    charts = {
        "curves": curves,
        "gradients": gradients,
        "responses": responses,
        "speed": speed,
        "zero_init": zero_init,
        "drift": drift,
    }
    written = []
    for part, chart in charts.items():
        if recorded.get(part):
            with rc_context(STYLE):
                figure = chart(recorded[part], recorded)
                for axis in figure.axes:
                    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
                FigureCanvasAgg(figure)
                written.append(folder / f"degradation_{part}.png")
                figure.savefig(written[-1], dpi=150)
    return written


def _panels(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _by_family(found: list[dict]) -> Iterator[tuple[int, str, list[tuple[dict, str]]]]:
    """(column, family, [(record, colour)]); one colour for each depth."""
    depths = sorted({one["depth"] for one in found})
    colours = {depth: DEPTH_COLOURS[i % len(DEPTH_COLOURS)] for i, depth in enumerate(depths)}
    for column, family in enumerate(("plain", "residual")):
        yield column, family, [(one, colours[one["depth"]]) for one in found if one["family"] == family]


def _name(one: dict) -> str:
    return f"{'ResNet' if one['family'] == 'residual' else 'plain'}-{one['depth']}"


def _epochs(values: list[float]) -> range:
    return range(1, len(values) + 1)


def curves(found: list[dict], recorded: dict) -> Figure:
    """The paper's figure 6: dashed training error, bold test error."""
    figure, axes = _panels(1, 2, (9, 4.4), sharey=True)
    for column, family, records in _by_family(found):
        axis = axes[0, column]
        for one, colour in records:
            axis.plot(_epochs(one["train_error"]), one["train_error"], "--", color=colour, linewidth=1)
            label = f"{_name(one)}: {one['test_error'][-1]:.1f} %"
            axis.plot(_epochs(one["test_error"]), one["test_error"], color=colour, linewidth=1.8, label=label)
        axis.set(xlabel="epoch", ylim=(0, 100), title=f"{family} nets")
        axis.legend(title="test error in the end", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    axes[0, 0].set_ylabel("error (%)")
    figure.suptitle(f"Training error (dashed) and test error (bold), {recorded['data']}", fontsize=12)
    return figure


def gradients(found: list[dict], recorded: dict) -> Figure:
    """The gradient's norm in every layer before the first step."""
    figure, axes = _panels(1, 2, (9, 3.6), sharey=True)
    for column, family, records in _by_family(found):
        axis = axes[0, column]
        for one, colour in records:
            axis.plot(range(1, len(one["norms"]) + 1), one["norms"], ".-", color=colour, markersize=3, label=_name(one))
        axis.set(xlabel="layer, from the input", yscale="log", title=f"{family} nets")
        axis.legend()
    axes[0, 0].set_ylabel(r"$\|\partial L / \partial W\|$")
    figure.suptitle(f"Gradient of every layer's weights before the first step, {recorded['data']}", fontsize=12)
    return figure


def responses(found: list[dict], recorded: dict) -> Figure:
    """The paper's figure 7: in order, and sorted by magnitude. Nets that leave the scale say how far."""
    figure, axes = _panels(2, 1, (8.5, 5.2), sharey=True)
    top = 1.05 * max((v for one in found if (v := max(one["deviations"])) < 2), default=2.0)
    for _, family, records in _by_family(found):
        for one, colour in records:
            style = "--" if family == "plain" else "-"
            highest = max(one["deviations"])
            label = _name(one) + (f" (up to {highest:.1f})" if highest > top else "")
            in_order, by_size = one["deviations"], sorted(one["deviations"], reverse=True)
            for axis, values in zip(axes[:, 0], (in_order, by_size), strict=True):
                layers = range(2, len(values) + 2)
                axis.plot(layers, values, style, color=colour, linewidth=1.2, label=label)
    axes[0, 0].set(xlabel="layer", title="in order", ylabel="standard deviation", ylim=(0.8, top))
    axes[1, 0].set(xlabel="layer, sorted by magnitude", title="sorted", ylabel="standard deviation")
    axes[0, 0].legend(ncols=2, fontsize=9)
    title = "Responses of the trained layers, behind batch norm and before ReLU and addition"
    figure.suptitle(f"{title}, {recorded['data']}", fontsize=12)
    return figure


def speed(found: list[dict], recorded: dict) -> Figure:
    """Eighteen layers, plain and residual."""
    figure, axes = _panels(1, 2, (9, 3.4))
    for one in found:
        name = "ResNet-18" if one["family"] == "residual" else "plain-18"
        colour = FAMILY_COLOURS[one["family"]]
        axes[0, 0].plot(_epochs(one["loss"]), one["loss"], color=colour, label=name)
        label = f"{name}: {one['test_error'][-1]:.1f} %"
        axes[0, 1].plot(_epochs(one["test_error"]), one["test_error"], color=colour, label=label)
    axes[0, 0].set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes[0, 1].set(xlabel="epoch", ylabel="test error (%)", ylim=(0, None))
    for axis in axes[0]:
        axis.legend()
    figure.suptitle(f"Convergence of 18-layer nets, {recorded['data']}", fontsize=12)
    return figure


def zero_init(found: dict, recorded: dict) -> Figure:
    """Training with residual branches that start at zero, and as usual."""
    figure, axes = _panels(1, 2, (9, 3.4))
    for key, colour, label in (("standard", "#7d8792", "He initialisation"), ("zero", "#1b4f8a", "last gamma zero")):
        axes[0, 0].plot(_epochs(found[key]["loss"]), found[key]["loss"], color=colour, label=label)
        errors = found[key]["test_error"]
        axes[0, 1].plot(_epochs(errors), errors, color=colour, label=f"{label}: {errors[-1]:.1f} %")
    axes[0, 0].set(xlabel="epoch", ylabel="training loss", yscale="log")
    axes[0, 1].set(xlabel="epoch", ylabel="test error (%)", ylim=(0, 100))
    for axis in axes[0]:
        axis.legend()
    title = f"ResNet-{found['depth']} whose blocks begin as the identity, {recorded['data']}"
    figure.suptitle(title, fontsize=12)
    return figure


def drift(found: list[dict], recorded: dict) -> Figure:
    """Losses of the same training, fused and module by module, and how far they are apart."""
    figure, axes = _panels(2, 2, (9, 5), sharex=True, sharey="row", gridspec_kw={"height_ratios": (3, 2)})
    styles = (("#d0d4d8", 4.0), ("#e0a030", 1.6), ("#3a86c8", 1.6), ("#7a3b8f", 1.0))
    for column, one in enumerate(found):
        (_, plain), *_ = one["runs"].items()
        for (name, run), (colour, width) in zip(one["runs"].items(), styles, strict=True):
            label = f"{name}: {run['test_error'][-1]:.1f} %, {run['gradient_error']:.0e}"
            axes[0, column].plot(run["steps"], color=colour, linewidth=width, label=label)
            apart = [abs(a - b) for a, b in zip(run["steps"], plain["steps"], strict=True)]
            if max(apart) > 0:
                axes[1, column].plot([a or float("nan") for a in apart], color=colour, linewidth=1)
        equal = [name for name, run in list(one["runs"].items())[1:] if run["steps"] == plain["steps"]]
        if equal:
            axes[1, column].set_title(f"equal bit for bit: {', '.join(equal)}", fontsize=9, loc="right")
        axes[0, column].set(yscale="log", title=_name(one))
        axes[1, column].set(yscale="log", xlabel="step")
        legend = "test error in the end, first gradient's error"
        axes[0, column].legend(fontsize=8, title=legend, title_fontsize=8)
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("|difference|")
    figure.suptitle(f"One seed, fused and module by module, {recorded['data']}", fontsize=12)
    return figure
