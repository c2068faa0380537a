"""Bring a GPU run's results home: check all of them, then put each where the checkout keeps it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import resnet_fused
from benchmarks import gpu_results, targets
from resnet_fused._command import UsageError
from resnet_fused.bench import schema
from resnet_fused.bench.results import Report, write_atomically, write_json
from resnet_fused.dispatch import table as tables

RESULTS, TABLES = Path("benchmarks/results"), Path("resnet_fused/dispatch/tables")
KEPT = (gpu_results.STATE, gpu_results.RESULTS, "summary.txt", "profile.png")
SAME = ("package", "torch", "triton", "commit")


def read(path: Path, default: Any) -> Any:
    """What a JSON file holds; the default where there is none, or one that was cut off."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return default


def measured(results: dict[str, Any]) -> Iterator[str]:
    """The goals, for a summary; what cannot be read is said by `collect`."""
    reports = []
    for name, data in results.items():
        try:
            reports += [schema.parse(data, name)] if gpu_results.is_report(data) else []
        except UsageError as error:
            yield str(error)
    yield ""
    yield from targets.lines(reports)


def collect(out: Path, root: Path) -> Iterator[str]:
    """Put a GPU run's results below `root`; a line for each. Collecting twice changes nothing.

    benchmarks/results/<gpu>/ gets the end-to-end runs as one result, and a folder with all that was measured;
    resnet_fused/dispatch/tables/ the plan table, if it speaks of this version and of kernels that were verified.

    Raises:
        UsageError: something is not what a GPU run writes; then nothing was written.
    """
    found = gpu_results.load(out)
    report = gpu_results.end_to_end(found)
    plan, why = _table(out, found)
    home = root / RESULTS / schema.folder_name({"gpu": {"name": found.gpu}})
    written = []
    if report is not None:
        known = [path for path in home.glob("*.json") if schema.load(path) == report]
        written.append(known[0] if known else schema.record(report, root / RESULTS))
    folder = home / f"gpu-run-{found.date}"
    for name in KEPT:
        if (out / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / name, lambda temporary, name=name: shutil.copyfile(out / name, temporary))  # type: ignore[misc]
    written.append(folder)
    if plan is not None:
        path = root / TABLES / tables.file_name(plan.gpu)
        before = tables.read(path)
        same = before is not None and all(before.provenance.get(k) == plan.provenance.get(k) for k in SAME)
        write_json((tables.merge(before, plan) if before is not None and same else plan).to_json(), path)
        written.append(path)
    return _lines(found, report, [path.relative_to(root) for path in written], why)


def _table(out: Path, found: gpu_results.GpuRun) -> tuple[tables.Table | None, str]:
    """The plan table, or None and why not."""
    path = out / "plan" / tables.file_name(found.gpu)
    if not path.exists():
        return None, "no plan table: tune has not run"
    try:
        plan = tables.from_json(json.loads(path.read_text()))
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    if plan.gpu != found.gpu:
        raise UsageError(f"{path}: of {plan.gpu}, the run's GPU is {found.gpu}")
    if not plan.verified:
        return None, f"{path} says of no kernel that it was verified: left out"
    facts = [report.provenance for name, report in found.reports.items() if name in gpu_results.END_TO_END]
    wanted = {"package": resnet_fused.__version__} | {key: one.get(key) for one in facts for key in SAME if key in one}
    for key, value in wanted.items():
        if plan.provenance.get(key) != value:
            return None, f"{path} was made with {key} {plan.provenance.get(key)}, not {value}: left out"
    return plan, ""


def _lines(found: gpu_results.GpuRun, report: Report | None, written: list[Path], why: str) -> Iterator[str]:
    yield from (f"wrote {path}" for path in written)
    if why:
        yield why
    for name, entry in found.state.items():
        if entry["status"] not in ("ok", "absent"):
            yield f"{name}: {entry['status']}: {entry['headline']}"
    yield ""
    yield f"for docs/gpu_log.md ({found.gpu}, {found.date}), under what was predicted:"
    for what, *_, text in targets.rows(list(found.reports.values())):
        yield f"- {what}: {text}"
    for name, run in found.reports.items():
        for case in run.cases:
            rates = [f"{r.contestant} {case.images_per_s(r):,.0f}" for r in case.results if r.timing]
            yield f"- {name}, {case.label}: measured {', '.join(rates) or 'nothing'} images/s"
    yield "then: make docs, and commit"
