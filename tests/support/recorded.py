"""Recorded results of no machine: reports with chosen times, for the tests of what is made from results."""

from __future__ import annotations

import dataclasses
import io
import math
from typing import Any

import torch
from rich.console import Console

from resnet_fused.bench.correctness import Errors
from resnet_fused.bench.results import CaseReport, Report, Result
from resnet_fused.measure import provenance
from resnet_fused.measure.cases import Case
from resnet_fused.measure.roof import Roof

BASELINE = "eager-channels-last"


def result(name: str, *samples: float, **changes: Any) -> Result:
    """A contestant with these milliseconds; without any it failed."""
    if not samples:
        return dataclasses.replace(Result(name, "failed", "it is wrong", Errors(math.inf)), **changes)
    ok = Result(name, "ok", errors=Errors(1e-6), setup_s=0.5, samples_ms=samples, peak_bytes=2**20)
    return dataclasses.replace(ok, **changes)


def case(*results: Result, mode: str = "infer", batch: int = 4, dtype: str = "fp32") -> CaseReport:
    return CaseReport.of(
        Case("resnet18", mode, batch, dtype, "cpu"),
        rounds=max((len(one.samples_ms or ()) for one in results), default=0),
        results=results,
        flops_per_step=10**9,
        roof_flops_per_s=Roof(1e11, 2e11),
    )


def report(*cases: CaseReport, **facts: Any) -> Report:
    """One measured here, with changes to its provenance."""
    found = provenance.collect(torch.device("cpu"), "resnet-fused bench") | facts
    return Report(schema=1, model="resnet18", baseline=BASELINE, provenance=found, cases=cases)


def usual(factor: float = 1.0, **facts: Any) -> Report:
    """Two cases in which `fused` is 1.25 times as fast as the baseline, all times `factor`."""
    base, fused = [10 * factor, 10.2 * factor, 9.9 * factor], [8 * factor, 8.1 * factor, 7.9 * factor]
    both = (result(BASELINE, *base), result("fused", *fused))
    return report(case(*both), case(*both, result("broken"), mode="train"), **facts)


def rendered(render, *args, width=120):
    """What a function prints to the console that is its last argument."""
    console = Console(width=width, record=True, file=io.StringIO())
    render(*args, console)
    return console.export_text()
