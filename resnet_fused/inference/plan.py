"""What `freeze` planned: which op of which backend runs each convolution, what it is fused with, and why not more."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class PlannedConv:
    """How a frozen model runs one convolution.

    Attributes:
        layer: its name in the model.
        backend: of the op that runs it; `"-"` where it is left to the model's own code.
        op: `"conv_fprop"`, `"conv_chain"`, `"conv_join"`, `"qconv2d_pointwise"` (oneDNN's, in int8), or `"-"`.
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
    """Every convolution of a frozen model, in the order of `named_modules`; `str()` is a table."""

    layers: tuple[PlannedConv, ...]

    def __str__(self) -> str:
        rows = [("layer", "backend", "op", "fused with", "why not more"), *(astuple(row)[:5] for row in self.layers)]
        if any(row.error is not None for row in self.layers):
            errors = ["-" if row.error is None else f"{row.error:.1e}" for row in self.layers]
            rows = [(*row[:3], error, *row[3:]) for row, error in zip(rows, ["int8 error", *errors], strict=True)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        counts = Counter((row.op, row.backend) for row in self.layers)
        how = [f"{n} left to the model" if op == "-" else f"{n} in {op} on {be}" for (op, be), n in counts.items()]
        lines.append(f"{len(self.layers)} convolutions: {', '.join(how)}" if how else "no convolutions")
        return "\n".join(line.rstrip() for line in lines)
