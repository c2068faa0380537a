"""The cost model as a table: bytes and floating-point operations per image, layer by layer, and the roofs of that."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resnet_fused._command import UsageError
from resnet_fused.bench import cost
from resnet_fused.bench.cost import Cost
from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.measure import network
from resnet_fused.measure.cases import Asked, Case
from resnet_fused.measure.network import Network

# (bytes/s, 16 bit floating-point operations/s) that good kernels reach: HBM's specified rate, and dense matrix products
# at the clock the power limit leaves.
GPUS = {"H100 SXM": (3.35e12, 800e12), "A100 80 GB": (2.04e12, 250e12)}
IN_WORDS = (
    "traced, not measured. eager: op by op; pointwise: batch norm, add and ReLU fused around PyTorch's convolutions; "
    "planned: all that this package fuses; docs/cost_model.md"
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The costs of one case by scheme, in order of computation."""

    case: Case
    network: Network
    costs: dict[str, list[Cost]]

    def per_image(self, scheme: str, where: str | None = None, layer: str | None = None) -> tuple[float, float]:
        """Megabytes and GFLOP per image of a scheme: of the whole step, of a block, or of one layer."""
        chosen = (
            c for c in self.costs[scheme] if (where is None or c.where == where) and (layer is None or c.layer == layer)
        )
        moved, flops = cost.total(chosen)
        return moved / self.case.batch / 1e6, flops / self.case.batch / 1e9

    def roof(self, scheme: str, gpu: str) -> float:
        """Images per second that the GPU cannot exceed."""
        return self.case.batch / cost.seconds(self.costs[scheme], *GPUS[gpu])

    def to_json(self) -> dict[str, Any]:
        schemes = {
            name: {
                "mb_per_image": self.per_image(name)[0],
                "gflop_per_image": self.per_image(name)[1],
                "roof_images_per_s": {gpu: self.roof(name, gpu) for gpu in GPUS},
                "ops": [dataclasses.asdict(c) for c in costs],
            }
            for name, costs in self.costs.items()
        }
        case = dataclasses.asdict(self.case)
        return {**{name: case[name] for name in ("model", "mode", "batch", "dtype")}, "schemes": schemes}


def rooflines(model: str, cases: Iterable[Asked], image_size: int = 224) -> list[Roofline]:
    """The cost model of (mode, batch, dtype) cases of a model, by name.

    Raises:
        UsageError: no such model, or one that is no ResNet; Triton is not installed.
    """
    plain = network.build(model)
    described = network.describe(plain, image_size)
    found = []
    for mode, batch, dtype in cases:
        case = Case(model, mode, batch, dtype, "meta", image_size)
        costs = cost.costs(plain, described, case)
        if "planned" not in costs:
            raise UsageError("--roofline traces a network on our Triton kernels: it needs triton, not installed here")
        found.append(Roofline(case, described, costs))
    return found


def render(roofline: Roofline, console: Console) -> None:
    """Print a row a block and a row a layer, totals of every scheme, and the roofs."""
    title = f"{roofline.case.model}, {roofline.case.label}: megabytes per image"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("layer", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    for name in ("GFLOP", *roofline.costs, "planned\n/ eager", "FLOP/byte"):
        table.add_column(name, justify="right", no_wrap=True)
    blocks = {block.name: block.layers for block in roofline.network.blocks}
    for where in dict.fromkeys(c.where for c in roofline.costs["eager"]):
        layers = blocks.get(where, ())
        shape = "" if layers else _shape(roofline.network.stem.shape) if where == "stem" else ""
        table.add_row(Text(where, style="bold"), shape, *_cells(roofline, where, None))
        for layer in layers:
            name = layer.name.removeprefix(f"{where}.")
            table.add_row(f"  {name}", _shape(layer.shape), *_cells(roofline, where, layer.name))
    table.add_section()
    table.add_row(Text("total", style="bold"), "", *_cells(roofline, None, None))
    console.print(table)
    for name in roofline.costs:
        megabytes, gflop = roofline.per_image(name)
        roofs = ", ".join(f"{roofline.roof(name, gpu):,.0f} on {gpu}" for gpu in GPUS)
        text = f"{name:<10} {megabytes:7.1f} MB, {gflop:.2f} GFLOP per image; at most images/s: {roofs}"
        console.print(text, highlight=False, soft_wrap=True)
    if roofline.case.torch_dtype == torch.float32:
        console.print("images/s assume 16 bit arithmetic: fp32 is slower still", highlight=False, soft_wrap=True)


def _cells(roofline: Roofline, where: str | None, layer: str | None) -> list[str]:
    moved = {name: roofline.per_image(name, where, layer)[0] for name in roofline.costs}
    flops = roofline.per_image("eager", where, layer)[1]
    cells = [f"{flops:.2f}"] + [f"{moved[name]:.2f}" if moved[name] else "-" for name in roofline.costs]
    ratio = f"{moved['planned'] / moved['eager']:.2f}" if moved["eager"] and moved["planned"] else "-"
    intensity = f"{flops * 1e3 / moved['planned']:.0f}" if moved["planned"] else "-"
    return [*cells, ratio, intensity]


def _shape(s: ConvShape) -> str:
    stride = f" / {s.stride[0]}" if s.stride != (1, 1) else ""
    groups = f" x {s.groups} groups" if s.groups > 1 else ""
    return f"{s.c} -> {s.k}, {s.r}x{s.s}{stride}{groups}, {s.h}x{s.w}"
