"""The results of a run, and their JSON form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from resnet_fused import _records
from resnet_fused._command import write_atomically as write_atomically  # for whoever writes results
from resnet_fused._command import write_json as write_json
from resnet_fused.bench.correctness import Errors
from resnet_fused.bench.images import Pictures
from resnet_fused.bench.loader import Row
from resnet_fused.measure.cases import Case, Dtype, Mode
from resnet_fused.measure.provenance import Provenance
from resnet_fused.measure.roof import Roof
from resnet_fused.measure.telemetry import Conditions
from resnet_fused.measure.timing import Timing

SCHEMA: Literal[1] = 1
Status = Literal["ok", "failed", "unavailable"]  # failed: wrong, or raised
INTERRUPTED = "interrupted"  # how a line of what was left out ends


@dataclasses.dataclass(frozen=True)
class Result:
    """One contestant on one case. Only `status == "ok"` carries a speed."""

    contestant: str
    status: Status
    reason: str | None = None
    errors: Errors | None = None
    setup_s: float | None = None
    timing: Timing | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None  # by autograd, in training
    agreement: float | None = None  # in top-1 with float64, of a quantised contestant

    @property
    def quantised(self) -> bool:
        return self.agreement is not None


@dataclasses.dataclass(frozen=True)
class CaseReport:
    """All contestants on one case, in the order of the table."""

    case: Case
    flops: int | None  # of a step; None where they could not be counted
    rounds: int
    results: tuple[Result, ...]
    roof: Roof | None = None
    conditions: Conditions | None = None  # clocks and throttling while it was timed, where a GPU tells

    def speedup(self, result: Result, baseline: str) -> float | None:
        """Median time of the baseline over that of `result`; None where one of them has no speed."""
        base = next((r.timing for r in self.results if r.contestant == baseline), None)
        return base.p50 / result.timing.p50 if base and result.timing else None

    def saved_ratio(self, result: Result, baseline: str) -> float | None:
        """Saved bytes over those of the baseline; None in inference."""
        base = next((r.saved_bytes for r in self.results if r.contestant == baseline), None)
        return result.saved_bytes / base if base and result.saved_bytes is not None else None

    def images_per_s(self, result: Result) -> float | None:
        return self.case.batch / result.timing.p50 * 1e3 if result.timing else None

    def flops_per_s(self, result: Result) -> float | None:
        return self.flops / result.timing.p50 * 1e3 if result.timing and self.flops else None


@dataclasses.dataclass(frozen=True)
class Report:
    """One run of the command."""

    model: str
    baseline: str
    provenance: Provenance
    cases: tuple[CaseReport, ...]
    left_out: tuple[str, ...] = ()
    pictures: Pictures | None = None
    loader: tuple[Row, ...] = ()  # training fed by a real input pipeline
    kernels: str | None = None  # what ours ran by: a line, where there is something to say

    def geometric_means(self, mode: str) -> dict[str, tuple[float, int]]:
        """By contestant: the geometric mean of its speed-ups over the cases of `mode`, and over how many of them.

        Of float arithmetic only: a quantised contestant computes something else.
        """
        logs: dict[str, list[float]] = {}
        for report in self.cases:
            for result in report.results if report.case.mode == mode else ():
                speedup = report.speedup(result, self.baseline)
                if speedup and not result.quantised:
                    logs.setdefault(result.contestant, []).append(math.log(speedup))
        return {name: (math.exp(sum(values) / len(values)), len(values)) for name, values in logs.items()}

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it: it holds what was measured until then."""
        return any(line.endswith(INTERRUPTED) for line in self.left_out)

    @property
    def measured(self) -> bool:
        """Whether anybody has a speed."""
        return any(result.timing for report in self.cases for result in report.results)

    def modes(self) -> list[str]:
        return list(dict.fromkeys(report.case.mode for report in self.cases))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values of a `ReportFile`, with all that is derived from the samples."""
        file = ReportFile(
            SCHEMA,
            self.model,
            self.baseline,
            self.provenance,
            tuple(self._case(report) for report in self.cases),
            self.left_out,
            {mode: {name: Mean(*mean) for name, mean in self.geometric_means(mode).items()} for mode in self.modes()},
            self.pictures,
            self.loader,
            self.kernels,
        )
        value: dict[str, Any] = _records.to_json(file)
        return value

    def _case(self, report: CaseReport) -> CaseFile:
        return CaseFile(
            **dataclasses.asdict(report.case),
            rounds=report.rounds,
            flops_per_step=report.flops,
            roof_flops_per_s=report.roof,
            conditions=report.conditions,
            results=tuple(self._result(report, result) for result in report.results),
        )

    def _result(self, report: CaseReport, result: Result) -> ResultFile:
        timing, rate = result.timing, report.flops_per_s(result)
        return ResultFile(
            contestant=result.contestant,
            status=result.status,
            reason=result.reason,
            images_per_s=report.images_per_s(result),
            speedup=report.speedup(result, self.baseline),
            ms=Percentiles(timing.p20, timing.p50, timing.p80) if timing else None,
            samples_ms=tuple(round(sample, 4) for sample in timing.samples_ms) if timing else None,
            setup_s=result.setup_s,
            peak_bytes=result.peak_bytes,
            saved=Saved(result.saved_bytes, report.saved_ratio(result, self.baseline))
            if result.saved_bytes is not None
            else None,
            flops_per_s=rate,
            roof_fraction=rate / report.roof.best if rate and report.roof and not result.quantised else None,
            errors=result.errors,
            agreement=result.agreement,
        )


# What a file holds. What has a default is not in the files of older versions.


@dataclasses.dataclass(frozen=True)
class Percentiles:
    """Of a contestant's samples."""

    p20: float
    p50: float
    p80: float


@dataclasses.dataclass(frozen=True)
class Saved:
    """What autograd saves, and that over the baseline's."""

    bytes: int
    ratio: float | None = None


@dataclasses.dataclass(frozen=True)
class Mean:
    """A geometric mean of speed-ups, and over how many cases."""

    speedup: float
    cases: int


@dataclasses.dataclass(frozen=True)
class ResultFile:
    """A `Result` in a file."""

    contestant: str
    status: Status
    reason: str | None
    images_per_s: float | None
    speedup: float | None
    ms: Percentiles | None
    samples_ms: tuple[float, ...] | None
    setup_s: float | None
    peak_bytes: int | None
    saved: Saved | None = None
    flops_per_s: float | None = None
    roof_fraction: float | None = None
    errors: Errors | None = None
    agreement: float | None = None


@dataclasses.dataclass(frozen=True)
class CaseFile:
    """A `CaseReport` in a file."""

    model: str
    mode: Mode
    batch: int
    dtype: Dtype
    device: str
    image_size: int
    rounds: int
    results: tuple[ResultFile, ...]
    flops_per_step: int | None = None
    roof_flops_per_s: Roof | None = None
    conditions: Conditions | None = None


@dataclasses.dataclass(frozen=True)
class ReportFile:
    """A `Report` in a file."""

    schema: Literal[1]
    model: str
    baseline: str
    provenance: Provenance
    cases: tuple[CaseFile, ...]
    left_out: tuple[str, ...]
    geometric_mean_speedup: dict[str, dict[str, Mean]] = dataclasses.field(default_factory=dict)
    pictures: Pictures | None = None
    loader: tuple[Row, ...] | None = ()
    kernels: str | None = None
