"""What was fused, what was left alone, and why."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

from resnet_fused._rows import grouped, table

_WIDTH = 160


@dataclass(frozen=True)
class FusionReport:
    """What `fuse` did to a model; `str()` is a summary and a table, in which equal rows are one and long ones are cut.

    Attributes:
        fused: (module name, what it computes fused), in the order of `named_modules`; the model itself is `""`.
        skipped: (module name, reason) of modules that were left alone, wholly or - where they are in `fused`, too - in
            part.
    """

    fused: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        parts = {name for name, _ in self.fused}
        why: dict[str, list[str]] = {name: [] for name in parts}  # of what is fused, what is not
        for name, reason in self.skipped:
            if name in parts:
                why[name].append(reason)
        in_part = sum(map(bool, why.values()))
        alone = sum(name not in parts for name, _ in self.skipped)
        modules = "module" if len(self.fused) == 1 else "modules"
        part = f", {in_part} of them in part" if in_part else ""
        summary = f"{len(self.fused)} {modules} fused{part}, {alone} left alone"
        shortened = ((name, textwrap.shorten(what, _WIDTH, placeholder=" ...")) for name, what in self.fused)
        rows = []
        for name, what in shortened:
            rows.append((name or "(model)", "in part" if why[name] else "fused", "; ".join([what, *why[name]])))
        rows += [(name or "(model)", "left alone", reason) for name, reason in self.skipped if name not in parts]
        if not rows:
            return summary
        if not alone and not in_part:  # the summary says it
            rows = [(name, "", what) for name, _, what in rows]
        head = ("module", "", "what runs as one operation (a-b-c), or why not" if parts else "why not")
        return "\n".join([summary, *table(head, grouped(rows))])
