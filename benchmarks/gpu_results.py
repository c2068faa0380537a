"""What a sitting at a GPU left behind (`python -m benchmarks.gpu_run`): read back, checked, as reports."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from resnet_fused.bench import schema
from resnet_fused.bench.results import Report
from resnet_fused.measure.cases import UsageError

FORMAT = 1
END_TO_END = ("train", "infer", "loader")  # the steps that measure what a user gets
RESULTS, STATE = "results.json", "state.json"


@dataclasses.dataclass(frozen=True)
class Sitting:
    """Attributes:
    gpu: its name.
    state: by the step's name: status, seconds, headline, commit, date_utc.
    data: by the step's name what it wrote.
    reports: of the steps that are runs of the bench.
    """

    gpu: str
    state: dict[str, dict[str, Any]]
    data: dict[str, Any]
    reports: dict[str, Report]

    @property
    def date(self) -> str:
        """Of its last step."""
        return str(max(entry["date_utc"] for entry in self.state.values()))[:10]


def load(folder: Path) -> Sitting:
    """What a folder of `gpu_run` holds.

    Raises:
        UsageError: a file is missing, or is not what a sitting writes; names the place.
    """
    state, data = (_json(folder / name) for name in (STATE, RESULTS))
    steps, gpu = state.get("steps"), state.get("gpu")
    if state.get("format") != FORMAT or not isinstance(gpu, str) or not isinstance(steps, dict) or not steps:
        raise UsageError(f"{folder / STATE}: not the state of a sitting")
    for name, entry in steps.items():
        if not all(isinstance(entry.get(field), str) for field in ("status", "headline", "date_utc")):
            raise UsageError(f"{folder / STATE}: not the state of a step: {name}")
    reports = {name: schema.parse(one, f"{folder / RESULTS}, {name}") for name, one in data.items() if is_report(one)}
    for name, one in data.items():
        facts = one.get("provenance") if isinstance(one, dict) else None
        if facts is not None and (facts.get("gpu") or {}).get("name") != gpu:
            raise UsageError(f"{folder / RESULTS}, {name}: measured on {facts.get('gpu')}, the sitting's is {gpu}")
    return Sitting(gpu, steps, data, reports)


def is_report(value: Any) -> bool:
    """Whether it is one of the bench's: the profile has no baseline."""
    return isinstance(value, dict) and "cases" in value and "baseline" in value


def end_to_end(sitting: Sitting) -> Report | None:
    """Training, inference and training from a loader as one report, where they are of one commit and of one torch.

    Raises:
        UsageError: they are not.
    """
    parts = [sitting.reports[name] for name in END_TO_END if name in sitting.reports]
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
        cases=tuple(sorted(cases.values(), key=lambda case: (case.case.mode, -case.case.batch))),
        left_out=tuple(line for part in parts for line in part.left_out),
        loader=tuple(row for part in parts for row in part.loader),
    )


def recorded(folder: Path) -> dict[Path, Sitting]:
    """Every sitting below a folder of results, oldest first.

    Raises:
        UsageError: one of them cannot be read.
    """
    found = {path.parent: load(path.parent) for path in folder.glob(f"*/sitting-*/{STATE}")}
    return dict(sorted(found.items(), key=lambda item: (item[1].date, item[0])))


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: no object")
    return data
