"""Rows of module names and what is said of them, as a table that fits a screen: equal rows are one."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest

WIDTH = 120
NAMES, CELL, SMALL_CELL = 40, 30, 20  # columns of the first cell, and of another but the last, at most
_NUMBER = re.compile(r"\[(\d+)-(\d+)\]|(\d+)")


def grouped(rows: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Rows that differ in the first cell alone become one, in the order of their first."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, *rest in rows:
        names.setdefault(tuple(rest), []).append(name)
    return [(", ".join(ranges(group)), *rest) for rest, group in names.items()]


def ranges(names: Sequence[str]) -> list[str]:
    """Names that count up in one place become one: `layer1.0`, `layer1.1` are `layer1.[0-1]`."""
    runs = list(names)
    while True:
        merged: list[str] = []
        for name in runs:
            pairs = ((k, _together(one, name)) for k, one in enumerate(merged))
            k, both = next(((k, both) for k, both in pairs if both), (len(merged), name))
            merged[k : k + 1] = [both]
        if len(merged) == len(runs):
            return merged
        runs = merged


def _together(first: str, second: str) -> str | None:
    """Both names in one, if they differ in one number and the second's follows."""
    for one, other in zip(_NUMBER.finditer(first), _NUMBER.finditer(second), strict=False):
        if one[0] == other[0]:
            continue
        low, high = int(one[1] or one[3]), int(one[2] or one[3])
        before, after = first[: one.start()], first[one.end() :]
        same = (before, after) == (second[: other.start()], second[other.end() :])
        return f"{before}[{low}-{high + 1}]{after}" if same and other[3] and int(other[3]) == high + 1 else None
    return None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: no empty column, long cells on several lines.

    Args:
        head: of the columns.
        rows: at least one, of as many cells.
    """
    kept = [k for k in range(len(head)) if any(row[k] for row in rows)]
    rows = [[row[k] for k in kept] for row in (head, *rows)]
    most = [NAMES, *[CELL if len(kept) < 5 else SMALL_CELL] * (len(kept) - 1)]
    widths = [min(max(map(len, column)), limit) for column, limit in zip(zip(*rows, strict=True), most, strict=True)]
    widths[-1] = WIDTH - sum(widths[:-1]) - 2 * (len(widths) - 1)
    lines = []
    for row in rows:
        wrapped = [_wrap(text, width) for text, width in zip(row, widths, strict=True)]
        for parts in zip_longest(*wrapped, fillvalue=""):
            cells = (f"{part:<{width}}" for part, width in zip(parts, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
