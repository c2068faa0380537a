"""What a GPU run left behind (`python -m benchmarks.gpu_run`): read back, checked, as reports."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypedDict

from resnet_fused import _records
from resnet_fused._command import UsageError
from resnet_fused._records import Misfit
from resnet_fused.bench import schema
from resnet_fused.bench.results import Report

END_TO_END = ("train", "infer", "loader")  # the steps that measure what a user gets
RESULTS, STATE = "results.json", "state.json"


class Entry(TypedDict):
    """What came of a step."""

    status: str
    seconds: float
    headline: str
    commit: str | None
    date_utc: str
    tries: int


@dataclasses.dataclass(frozen=True)
class State:
    """What state.json holds."""

    format: Literal[1]
    gpu: str
    steps: dict[str, Entry]


@dataclasses.dataclass(frozen=True)
class GpuRun:
    """Attributes:
    gpu: its name.
    state: by the step's name.
    data: by the step's name what it wrote.
    reports: of the steps that are runs of the bench.
    """

    gpu: str
    state: dict[str, Entry]
    data: dict[str, Any]
    reports: dict[str, Report]

    @property
    def date(self) -> str:
        """Of its last step."""
        return max(entry["date_utc"] for entry in self.state.values())[:10]


def load(folder: Path) -> GpuRun:
    """What a folder of `gpu_run` holds.

    Raises:
        UsageError: a file is missing, or is not what a GPU run writes; names the place.
    """
    state = _read(State, folder / STATE)
    if not state.steps:
        raise UsageError(f"{folder / STATE}: steps is empty")
    data = _read(dict[str, Any], folder / RESULTS)
    reports = {name: schema.parse(one, f"{folder / RESULTS}, {name}") for name, one in data.items() if is_report(one)}
    for name, one in data.items():
        facts = one.get("provenance") if isinstance(one, dict) else None
        if facts is not None and (facts.get("gpu") or {}).get("name") != state.gpu:
            raise UsageError(f"{folder / RESULTS}, {name}: measured on {facts.get('gpu')}, the run's is {state.gpu}")
    return GpuRun(state.gpu, state.steps, data, reports)


def _read(kind: Any, path: Path) -> Any:
    try:
        return _records.load(kind, schema.read_json(path))
    except Misfit as misfit:
        raise UsageError(f"{path}: {misfit}") from None


def is_report(value: Any) -> bool:
    """Whether it is one of the bench's: the profile has no baseline."""
    return isinstance(value, dict) and "cases" in value and "baseline" in value


def end_to_end(run: GpuRun) -> Report | None:
    """Training, inference and training from a loader as one report, where they are of one commit and of one torch.

    Raises:
        UsageError: they are not.
    """
    parts = [run.reports[name] for name in END_TO_END if name in run.reports]
    if not parts:
        return None
    facts = [part.provenance for part in parts]
    for name in ("torch", "triton", "commit", "model"):
        values = [part.model if name == "model" else part.provenance.get(name) for part in parts]
        if any(value != values[0] for value in values):
            steps = " and ".join(f"{step} {value}" for step, value in zip(END_TO_END, values, strict=False))
            raise UsageError(f"measured with different {name} ({steps}): run them again, `--again`")
    first = parts[0]
    cases = {case.case: case for part in reversed(parts) for case in part.cases}  # a case twice: the first part's
    return dataclasses.replace(
        first,
        provenance={**facts[0], "command": "; ".join(one["command"] for one in facts)},
        cases=tuple(sorted(cases.values(), key=lambda case: (case.mode, -case.batch))),
        left_out=tuple(line for part in parts for line in part.left_out),
        loader=tuple(row for part in parts for row in part.loader or ()),
    )


def recorded(folder: Path) -> dict[Path, GpuRun]:
    """Every GPU run below a folder of results, oldest first.

    Raises:
        UsageError: one of them cannot be read.
    """
    found = {path.parent: load(path.parent) for path in folder.glob(f"*/gpu-run-*/{STATE}")}
    return dict(sorted(found.items(), key=lambda item: (item[1].date, item[0])))
