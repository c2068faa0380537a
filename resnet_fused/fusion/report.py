"""What was fused, what was left alone, and why."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field

_WIDTH = 160


@dataclass(frozen=True)
class FusionReport:
    """What `fuse` did to a model; `str()` is a table, in which long entries are cut.

    Attributes:
        fused: (module name, what it computes fused), in the order of `named_modules`; the model itself is `""`.
        skipped: (module name, reason) of modules that were left alone, wholly or - where they are in `fused`, too - in
            part.
    """

    fused: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        parts = {name for name, _ in self.fused}
        shortened = ((name, textwrap.shorten(what, _WIDTH, placeholder=" ...")) for name, what in self.fused)
        rows = [(name or "(model)", "fused", what) for name, what in shortened]
        for name, reason in self.skipped:
            rows.append((name or "(model)", "in part" if name in parts else "left alone", reason))
        rows = [("module", "", "what, or why not"), *rows]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{name:<{widths[0]}}  {state:<{widths[1]}}  {text}".rstrip() for name, state, text in rows]
        lines.insert(1, "  ".join("-" * width for width in (*widths, max(len(row[2]) for row in rows))))
        in_part = len(parts & {name for name, _ in self.skipped})
        alone = sum(name not in parts for name, _ in self.skipped)
        lines.append(f"{len(self.fused)} fused{f', {in_part} of them in part' if in_part else ''}, {alone} left alone")
        return "\n".join(lines)
