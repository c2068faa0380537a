"""What `python -m benchmarks.questions` found: a row a kernel and shape, beside PyTorch's own and the measured roof."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .cases import UsageError

SCHEMA = 1
HEAD = ("question", "shape", "kernel", "ms", "against", "ms", "ratio", "of roof")


@dataclasses.dataclass(frozen=True)
class Answer:
    """Attributes:
    question: its name.
    shape: what it was asked of.
    kernel: the formulation of ours.
    ours: its best configuration that was right; None where there is none.
    ours_ms, plain_ms: medians, cold L2.
    plain: the fastest of PyTorch's own ways; None where it has no equal.
    least_ms: what the measured roofs allow.
    problem: why there is no time of ours; None where there is one.
    """

    question: str
    shape: str
    kernel: str
    ours: str | None = None
    ours_ms: float | None = None
    plain: str | None = None
    plain_ms: float | None = None
    least_ms: float | None = None
    problem: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.question, self.shape, self.kernel

    @property
    def ratio(self) -> float | None:
        """Above 1: ours is faster."""
        return self.plain_ms / self.ours_ms if self.plain_ms and self.ours_ms else None

    @property
    def roof(self) -> float | None:
        """Of what the roofs allow; 1 is as fast as the machine."""
        return self.least_ms / self.ours_ms if self.least_ms and self.ours_ms else None

    def cells(self) -> tuple[str, ...]:
        if self.problem is not None:
            return self.question, self.shape, self.kernel, "-", self.problem, "", "", ""
        plain = (self.plain or "-", f"{self.plain_ms:.4f}" if self.plain_ms else "-")
        ratio = f"{self.ratio:.2f}x" if self.ratio else "-"
        roof = f"{self.roof:.0%}" if self.roof else "-"
        return self.question, self.shape, self.ours or self.kernel, f"{self.ours_ms:.4f}", *plain, ratio, roof


def lines(answers: Iterable[Answer]) -> Iterator[str]:
    """A table for a terminal."""
    rows = [HEAD, *(answer.cells() for answer in answers)]
    widths = [max(len(row[column]) for row in rows if row[5] or column < 4) for column in range(len(HEAD))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def markdown(answers: Iterable[Answer]) -> Iterator[str]:
    """The same table for a page."""
    yield f"| {' | '.join(HEAD)} |"
    yield "|---|---|---|--:|---|--:|--:|--:|"
    yield from (f"| {' | '.join(cell.replace('|', '/') for cell in answer.cells())} |" for answer in answers)


def geometric_means(answers: Iterable[Answer]) -> dict[tuple[str, str], tuple[float, int, int]]:
    """By question and kernel: the geometric mean of the ratios, of how many shapes, and in how many ours is faster."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for answer in answers:
        if answer.ratio:
            ratios.setdefault((answer.question, answer.kernel), []).append(answer.ratio)
    return {
        key: (math.exp(sum(map(math.log, values)) / len(values)), len(values), sum(value > 1 for value in values))
        for key, values in ratios.items()
    }


def from_json(data: Any, where: object = "the answers") -> tuple[Answer, ...]:
    """The answers of the file that `benchmarks.questions` wrote.

    Raises:
        UsageError: it is none; the message names the place.
    """

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise UsageError(f"{where}: no file of `python -m benchmarks.questions`: {what}")

    need(isinstance(data, dict) and data.get("schema") == SCHEMA, f"its schema is not {SCHEMA}")
    need(isinstance(data.get("provenance"), dict) and isinstance(data.get("answers"), list), "parts are missing")
    names = {field.name for field in dataclasses.fields(Answer)}
    found = []
    for row in data["answers"]:
        need(isinstance(row, dict) and set(row) == names, f"a row with {sorted(row) if isinstance(row, dict) else row}")
        answer = Answer(**row)
        need(all(isinstance(text, str) for text in answer.key), f"the name of {row}")
        times = (answer.ours_ms, answer.plain_ms, answer.least_ms)
        good = all(t is None or (isinstance(t, int | float) and 0 < t < math.inf) for t in times)
        need(good, f"a time of {answer.key}")
        need((answer.problem is None) == (answer.ours_ms is not None), f"{answer.key} has a time if and only if right")
        found.append(answer)
    need(len({answer.key for answer in found}) == len(found), "a row is there twice")
    return tuple(found)


def load(path: Path) -> tuple[Answer, ...]:
    """See `from_json`."""
    try:
        return from_json(json.loads(path.read_text()), path)
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: {error}") from None
