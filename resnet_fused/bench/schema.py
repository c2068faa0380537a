"""Recorded results: read back and checked, and kept append-only under a folder a machine."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from resnet_fused.bench.correctness import Errors
from resnet_fused.bench.results import SCHEMA, CaseReport, Report, Result, write_json
from resnet_fused.measure import provenance
from resnet_fused.measure.cases import DTYPES, MODES, Case, UsageError
from resnet_fused.measure.roof import Roof
from resnet_fused.measure.timing import Timing

STATUSES = ("ok", "failed", "unavailable")
ROUNDING = 1e-3  # of what is derived, against the samples, which are written with four decimals

_OPTIONAL = (int, float, type(None))
_REPORT = {"model": str, "baseline": str, "provenance": dict, "cases": list, "left_out": list}
_PROVENANCE = {"date_utc": str, "command": str, "torch": str, "cpu": dict, "gpu": (dict, type(None))}
_CASE = {"mode": str, "batch": int, "dtype": str, "device": str, "image_size": int, "rounds": int, "results": list}
_RESULT = {"contestant": str, "status": str, "reason": (str, type(None)), "samples_ms": (list, type(None))}
_NUMBERS = dict.fromkeys(("images_per_s", "speedup", "setup_s", "peak_bytes"), _OPTIONAL)


def load(path: Path) -> Report:
    """A result file of `resnet-fused bench --json`, as the report it was written from.

    What a file derives from its samples - medians, images per second, speed-ups - is compared with them, so that no
    number in a result file can be a typed one.

    Raises:
        UsageError: no such file, no JSON, another schema, or values that contradict each other; names the place.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}: no JSON: {error}") from None
    return parse(data, path)


def parse(data: Any, where: object) -> Report:
    """As `load`, of what such a file holds; `where` is named in the error."""
    try:
        return _report(data)
    except _Misfit as misfit:
        raise UsageError(f"{where}: no result of `resnet-fused bench --json`: {misfit}") from None


class _Misfit(Exception):
    pass


def _need(condition: bool, problem: str) -> None:
    if not condition:
        raise _Misfit(problem)


def _fields(value: Any, kinds: dict[str, Any], where: str) -> None:
    _need(isinstance(value, dict), f"{where} is no object")
    for name, kind in kinds.items():
        _need(name in value, f"{where} has no {name!r}")
        fits = isinstance(value[name], kind) and not isinstance(value[name], bool)
        _need(fits, f"{name} of {where} is {json.dumps(value[name])[:40]}")


def _report(data: Any) -> Report:
    _fields(data, {"schema": int}, "the file")
    _need(data["schema"] == SCHEMA, f"its schema is {data['schema']}, this version reads {SCHEMA}")
    _fields(data, _REPORT, "the file")
    facts = data["provenance"]
    _fields(facts, _PROVENANCE, "provenance")
    _fields(facts["cpu"], {"name": str, "capability": str, "threads": int}, "provenance.cpu")
    if facts["gpu"]:
        _fields(facts["gpu"], {"name": str}, "provenance.gpu")
    commit = facts.get("commit")
    if commit is not None:
        _fields(commit, {"sha": str}, "provenance.commit")
        _need(isinstance(commit.get("dirty"), bool), "provenance.commit has no 'dirty'")
    cases = tuple(_case(case, data) for case in data["cases"])
    _need(bool(cases), "it has no cases")
    left_out, loader = tuple(data["left_out"]), tuple(data.get("loader") or ())
    return Report(data["model"], data["baseline"], facts, cases, left_out, data.get("pictures"), loader)


def _case(data: Any, file: dict[str, Any]) -> CaseReport:
    _fields(data, _CASE, "a case")
    _need(data["mode"] in MODES, f"mode {data['mode']!r} of a case")
    _need(data["dtype"] in DTYPES, f"dtype {data['dtype']!r} of a case")
    geometry = (data["mode"], data["batch"], data["dtype"], data["device"], data["image_size"])
    case = Case(data.get("model", file["model"]), *geometry)
    roof = data.get("roof_flops_per_s")
    if roof is not None:
        _fields(roof, {"gemm": float, "conv": float}, f"the roof of {case.label}")
    results = tuple(_result(result, case) for result in data["results"])
    names = [result.contestant for result in results]
    _need(len(set(names)) == len(names), f"a contestant of {case.label} is there twice")
    report = CaseReport(
        case,
        data.get("flops_per_step"),
        data["rounds"],
        results,
        Roof(roof["gemm"], roof["conv"]) if roof else None,
        data.get("conditions"),
    )
    for result, written in zip(results, data["results"], strict=True):
        taken = len(result.timing.samples_ms) if result.timing else data["rounds"]
        _need(taken == data["rounds"], f"{result.contestant} in {case.label} has {taken} samples, not one a round")
        where = f"{result.contestant} in {case.label}"
        _same(written["images_per_s"], report.images_per_s(result), f"images_per_s of {where}")
        _same(written["speedup"], report.speedup(result, file["baseline"]), f"speedup of {where}")
    return report


def _result(data: Any, case: Case) -> Result:
    where = f"a result of {case.label}"
    _fields(data, _RESULT, where)
    where = f"{data['contestant']} in {case.label}"
    _fields(data, _NUMBERS, where)
    _need(data["status"] in STATUSES, f"status {data['status']!r} of {where}")
    samples = data["samples_ms"]
    _need(bool(samples) == (data["status"] == "ok"), f"{where} is {data['status']}: it has a speed if and only if ok")
    timing = None
    if samples:
        _need(all(isinstance(s, int | float) and 0 < s < math.inf for s in samples), f"samples_ms of {where}")
        timing = Timing(tuple(map(float, samples)))
        _fields(data, {"ms": dict}, where)
        for name in ("p20", "p50", "p80"):
            _same(data["ms"].get(name), getattr(timing, name), f"{name} of {where}")
    errors = data.get("errors")
    if errors is not None:
        names = {field.name for field in dataclasses.fields(Errors)}
        _need(isinstance(errors, dict) and {"logits"} <= set(errors) <= names, f"errors of {where}")
        errors = Errors(**{name: math.inf if value == "inf" else value for name, value in errors.items()})
    saved = data.get("saved")
    if saved is not None:
        _fields(saved, {"bytes": int}, f"saved of {where}")
    return Result(
        data["contestant"],
        data["status"],
        data["reason"],
        errors,
        data["setup_s"],
        timing,
        data["peak_bytes"],
        saved["bytes"] if saved else None,
    )


def _same(written: Any, derived: float | None, what: str) -> None:
    if written is None or derived is None:
        _need(written is derived, f"{what} is {written}, its samples say {derived}")
    else:
        near = isinstance(written, int | float) and math.isclose(written, derived, rel_tol=ROUNDING)
        _need(near, f"{what} is {written}, its samples say {derived:.6g}")


def folder_name(facts: dict[str, Any]) -> str:
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


def last(folder: Path, facts: dict[str, Any]) -> tuple[Path, Report] | None:
    """The newest result below `folder` that was measured on the device that `facts` (a provenance) describes."""
    device = provenance.device_name(facts)
    same = [item for item in recorded(folder).items() if provenance.device_name(item[1].provenance) == device]
    return same[-1] if same else None
