"""Recorded results: read back and checked, and kept append-only under a folder a machine."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from resnet_fused import _records
from resnet_fused._command import UsageError
from resnet_fused._records import Misfit
from resnet_fused.bench.results import DERIVED, Report, write_json
from resnet_fused.measure import provenance
from resnet_fused.measure.provenance import Provenance

ROUNDING = 1e-3  # of what is derived, against the samples, which are written with four decimals


def load(path: Path) -> Report:
    """A result file of `resnet-fused bench --json`, as the report it was written from.

    What a file derives from its samples - medians, images per second, speed-ups - is compared with them, so that no
    number in a result file can be a typed one.

    Raises:
        UsageError: no such file, no JSON, another schema, or values that contradict each other; names the place.
    """
    return parse(read_json(path), path)


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        UsageError: there is none, or it holds no JSON.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: no JSON: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def parse(data: Any, where: object) -> Report:
    """As `load`, of what such a file holds; `where` is named in the error."""
    try:
        report: Report = _records.load(Report, _measured(data))
        _check(report)
        for place, written, derived in _differences(data, json.loads(json.dumps(report.to_json()))):
            raise Misfit(place, f"is {written}, its samples say {derived}")
    except Misfit as misfit:
        raise UsageError(f"{where}: no result of `resnet-fused bench --json`: {misfit}") from None
    return report


def _measured(data: Any) -> Any:
    """What a file holds, without what it derives."""
    if not isinstance(data, dict):
        return data
    of_report, of_cases = DERIVED
    return {k: _without(v, of_cases) if k == "cases" else v for k, v in data.items() if k not in of_report}


def _without(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {name: _without(inner, names) for name, inner in value.items() if name not in names}
    return [_without(inner, names) for inner in value] if isinstance(value, list) else value


def _check(report: Report) -> None:
    if not report.cases:
        raise Misfit("cases", "is empty")
    for i, case in enumerate(report.cases):
        names = [result.contestant for result in case.results]
        if len(set(names)) < len(names):
            raise Misfit(f"cases[{i}].results", "holds a contestant twice")
        for k, result in enumerate(case.results):
            place, samples = f"cases[{i}].results[{k}]", result.samples_ms
            if bool(samples) != (result.status == "ok"):
                raise Misfit(
                    place, f"({result.contestant}) is {result.status}: it has samples_ms if and only if it is ok"
                )
            if samples and (len(samples) != case.rounds or not all(0 < sample < math.inf for sample in samples)):
                raise Misfit(f"{place}.samples_ms", f"is not {case.rounds} times, one a round")


def _differences(written: Any, derived: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(place, written, derived) of what differs by more than rounding."""
    if isinstance(written, dict) and isinstance(derived, dict):
        for name in written:
            yield from _differences(written[name], derived.get(name), f"{place}.{name}" if place else name)
    elif isinstance(written, list) and isinstance(derived, list) and len(written) == len(derived):
        for i, (one, other) in enumerate(zip(written, derived, strict=True)):
            yield from _differences(one, other, f"{place}[{i}]")
    elif isinstance(written, float) and isinstance(derived, float):
        if not math.isclose(written, derived, rel_tol=ROUNDING):
            yield place, f"{written:.6g}", f"{derived:.6g}"
    elif written != derived:
        yield place, written, derived


def folder_name(facts: Provenance) -> str:
    """The folder of a machine's results: its GPU's name; or its CPU's with instruction set and threads."""
    if facts["gpu"]:
        text = facts["gpu"]["name"]
    else:
        cpu = facts["cpu"]
        text = f"cpu {cpu['name']} {cpu['capability']} {cpu['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def record(report: Report, folder: Path) -> Path:
    """Write a report below `folder`, into a new file of its machine's folder; nothing there is ever replaced."""
    date = report.provenance["date_utc"][:10]
    home = folder / folder_name(report.provenance)
    stem = f"{report.model.replace(':', '-')}-{date}"
    home.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = home / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        try:
            path.open("x").close()  # claims the name
        except FileExistsError:
            number += 1
            continue
        write_json(report.to_json(), path)
        return path


def recorded(folder: Path) -> dict[Path, Report]:
    """Every result below `folder`, oldest first.

    Raises:
        UsageError: one of them does not hold what a result holds.
    """
    found = {path: load(path) for path in sorted(folder.glob("*/*.json"))}
    return dict(
        sorted(found.items(), key=lambda item: (item[1].provenance["date_utc"], len(item[0].name), item[0].name))
    )


def last(folder: Path, facts: Provenance) -> tuple[Path, Report] | None:
    """The newest result below `folder` that was measured on the device that `facts` (a provenance) describes."""
    device = provenance.device_name(facts)
    same = [item for item in recorded(folder).items() if provenance.device_name(item[1].provenance) == device]
    return same[-1] if same else None
