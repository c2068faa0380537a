"""What `freeze` planned: which op of which backend runs each convolution, what it is fused with, and why not more."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from dataclasses import dataclass

from resnet_fused._rows import grouped, table

LAYER_BY_LAYER = "aten runs layer by layer"
MEANING = {
    "qconv2d_pointwise": "oneDNN's convolution in 8 bits",
    "int8_conv": "our convolution in 8 bits",
    "conv_fprop_int8": "our convolution in 8 bits",
    "conv_chain": "a bottleneck's 3x3 convolution and the 1x1 convolutions behind it in one kernel",
    "conv_join": "a block's last convolution and its shortcut's projection in one kernel",
    "conv_join_int8": "a block's last convolution and its shortcut's projection in one kernel, in 8 bits",
}


@dataclass(frozen=True)
class PlannedConv:
    """How a frozen model runs one convolution.

    Attributes:
        layer: its name in the model.
        backend: of the op that runs it; `"-"` where it is left to the model's own code.
        op: `"conv_fprop"`, `"conv_chain"`, `"conv_join"`, or `"-"`; in int8 `"int8_conv"`, `"qconv2d_pointwise"`
            (oneDNN's), `"conv_fprop_int8"` or `"conv_join_int8"`.
        fused: what the op computes beside it.
        reason: why the op does not run on the backend asked for, or does not compute more; empty if nothing was in
            the way.
        error: in int8, || int8 - float || / || float || of its result on the first calibration input, given the same
            float input; None in the float dtype.
    """

    layer: str
    backend: str
    op: str
    fused: str
    reason: str = ""
    error: float | None = None


@dataclass(frozen=True)
class FreezePlan:
    """Every convolution of a frozen model, in the order of `named_modules`; `str()` is a summary and a table."""

    layers: tuple[PlannedConv, ...]

    def __str__(self) -> str:
        if not self.layers:
            return "no convolutions"
        counts = Counter((row.op, row.backend) for row in self.layers)
        how = ", ".join(
            f"{n} left to the model" if op == "-" else f"{n} in {op} on {backend}"
            for (op, backend), n in counts.items()
        )
        how = how.replace(" on aten", " on aten (native PyTorch kernels, layer by layer)", 1)
        how = how.replace(" on cpu", " on cpu (our kernels)", 1)
        lines = textwrap.wrap(f"{len(self.layers)} convolutions: {how}", 120, subsequent_indent="  ")
        lines += [f"{op}: {text}" for op, text in MEANING.items() if any(row.op == op for row in self.layers)]
        worst = sorted((row for row in self.layers if row.error is not None), key=lambda row: -(row.error or 0.0))[:3]
        if worst:
            names = ", ".join(f"{row.layer} {row.error:.1%}" for row in worst)
            lines.append(f"int8 error: of each layer's result, to float; largest: {names}")
        rows, errors = [], dict[tuple[str, ...], list[float]]()
        for row in self.layers:
            by = "the model" if row.op == "-" else f"{row.op} on {row.backend}"
            reasons = [part for part in row.reason.split("; ") if not part.endswith(LAYER_BY_LAYER)]
            texts = (self._seen_from(row.layer, text) for text in (row.fused, "; ".join(reasons)))
            what = (by if len(counts) > 1 else "", *texts)  # else the first line has said by what
            rows.append((row.layer, *what))
            errors.setdefault(what, []).extend(() if row.error is None else (row.error,))
        shown = [(name, what[0], _span(errors[tuple(what)]), *what[1:]) for name, *what in grouped(rows)]
        return "\n".join([*lines, *table(("layer", "run by", "int8 error", "fused with", "why not more"), shown)])

    def _seen_from(self, layer: str, text: str) -> str:
        """The text with layers named as those of the same, the next or the previous block, so that blocks compare."""
        here = layer.split(".")
        known = {row.layer for row in self.layers}

        def rename(match: re.Match[str]) -> str:
            there = match[0].split(".")
            if match[0] not in known or match[0] == layer:
                return "it" if match[0] == layer else match[0]
            first = next(k for k, (one, other) in enumerate(zip(here, there, strict=False)) if one != other)
            if here[first].isdigit() and there[first].isdigit():
                step = int(there[first]) - int(here[first])
                block = {1: "the next block's", -1: "the previous block's"}.get(step)
                return f"{block} {'.'.join(there[first + 1 :])}" if block else match[0]
            return ".".join(there[first:])

        return re.sub(r"\w+(?:\.\w+)+", rename, text)


def _span(errors: list[float]) -> str:
    """From the least to the largest."""
    least, most = (f"{100 * error:.1f}" for error in (min(errors, default=0.0), max(errors, default=0.0)))
    return "" if not errors else f"{most} %" if least == most else f"{least} - {most} %"
