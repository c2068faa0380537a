"""The results of a run, and their JSON form."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any, Literal

from resnet_fused import _records
from resnet_fused._command import write_atomically as write_atomically  # for whoever writes results
from resnet_fused._command import write_json as write_json
from resnet_fused.bench.correctness import Errors
from resnet_fused.bench.images import Pictures
from resnet_fused.bench.loader import Row
from resnet_fused.measure.cases import Case
from resnet_fused.measure.provenance import Provenance
from resnet_fused.measure.roof import Roof
from resnet_fused.measure.telemetry import Conditions
from resnet_fused.measure.timing import Timing

SCHEMA: Literal[1] = 1
Status = Literal["ok", "failed", "unavailable"]  # failed: wrong, or raised
# What a file has beside the fields, derived from them. Those of a report, and those of its cases.
DERIVED = ("geometric_mean_speedup",), ("images_per_s", "speedup", "ms", "flops_per_s", "roof_fraction", "ratio")
INTERRUPTED = "interrupted"  # how a line of what was left out ends


@dataclasses.dataclass(frozen=True)
class Saved:
    """What autograd saves for the backward."""

    bytes: int


@dataclasses.dataclass(frozen=True)
class Result:
    """One contestant on one case. Only `status == "ok"` carries a speed."""

    contestant: str
    status: Status
    reason: str | None = None
    errors: Errors | None = None
    setup_s: float | None = None
    samples_ms: tuple[float, ...] | None = None
    peak_bytes: int | None = None
    saved: Saved | None = None  # in training
    agreement: float | None = None  # in top-1 with float64, of a quantised contestant

    @property
    def timing(self) -> Timing | None:
        return Timing(self.samples_ms) if self.samples_ms else None

    @property
    def quantised(self) -> bool:
        return self.agreement is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseReport(Case):
    """A case, and all contestants on it in the order of the table.

    Attributes:
        rounds: that were timed.
        results: a contestant each.
        flops_per_step: None where they could not be counted.
        roof_flops_per_s: of the machine, measured.
        conditions: clocks and throttling while it was timed, where a GPU tells.
    """

    rounds: int
    results: tuple[Result, ...]
    flops_per_step: int | None = None
    roof_flops_per_s: Roof | None = None
    conditions: Conditions | None = None

    @classmethod
    def of(cls, case: Case, **measured: Any) -> CaseReport:
        """What was measured of a case."""
        return cls(**dataclasses.asdict(case), **measured)

    @property
    def case(self) -> Case:
        """What was to be measured."""
        return Case(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Case)})

    def result(self, contestant: str) -> Result | None:
        """Of a contestant, if it took part."""
        return next((result for result in self.results if result.contestant == contestant), None)

    def timing(self, contestant: str) -> Timing | None:
        """Of a contestant, if it has one."""
        result = self.result(contestant)
        return result.timing if result else None

    def speedup(self, result: Result, baseline: str) -> float | None:
        """Median time of the baseline over that of `result`; None where one of them has no speed."""
        base = self.timing(baseline)
        return base.p50 / result.timing.p50 if base and result.timing else None

    def saved_ratio(self, result: Result, baseline: str) -> float | None:
        """Saved bytes over those of the baseline; None in inference."""
        base = self.result(baseline)
        return (
            result.saved.bytes / base.saved.bytes if base and base.saved and base.saved.bytes and result.saved else None
        )

    def images_per_s(self, result: Result) -> float | None:
        return self.batch / result.timing.p50 * 1e3 if result.timing else None

    def flops_per_s(self, result: Result) -> float | None:
        return self.flops_per_step / result.timing.p50 * 1e3 if result.timing and self.flops_per_step else None

    def roof_fraction(self, result: Result) -> float | None:
        """Of the roof, which is that of float arithmetic."""
        rate = self.flops_per_s(result)
        return rate / self.roof_flops_per_s.best if rate and self.roof_flops_per_s and not result.quantised else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One run of the command. Its fields are what a file holds, beside what `to_json` derives from them; what has a
    default is not in the files of older versions.
    """

    schema: Literal[1]
    model: str
    baseline: str
    provenance: Provenance
    cases: tuple[CaseReport, ...]
    left_out: tuple[str, ...] = ()
    pictures: Pictures | None = None
    loader: tuple[Row, ...] | None = ()  # training fed by a real input pipeline
    kernels: str | None = None  # what ours ran by: a line, where there is something to say

    def geometric_means(self, mode: str) -> dict[str, tuple[float, int]]:
        """By contestant: the geometric mean of its speed-ups over the cases of `mode`, and over how many of them.

        Of float arithmetic only: a quantised contestant computes something else.
        """
        speedups: dict[str, list[float]] = {}
        for report in self.cases:
            for result in report.results if report.mode == mode else ():
                speedup = report.speedup(result, self.baseline)
                if speedup and not result.quantised:
                    speedups.setdefault(result.contestant, []).append(speedup)
        return {name: (statistics.geometric_mean(values), len(values)) for name, values in speedups.items()}

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it: it holds what was measured until then."""
        return any(line.endswith(INTERRUPTED) for line in self.left_out)

    @property
    def measured(self) -> bool:
        """Whether anybody has a speed."""
        return any(result.timing for report in self.cases for result in report.results)

    def modes(self) -> list[str]:
        return list(dict.fromkeys(report.mode for report in self.cases))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values: the fields, and what is derived from the samples."""
        value: dict[str, Any] = _records.to_json(self)
        value["geometric_mean_speedup"] = {
            mode: {
                name: {"speedup": mean, "cases": count} for name, (mean, count) in self.geometric_means(mode).items()
            }
            for mode in self.modes()
        }
        for report, case in zip(self.cases, value["cases"], strict=True):
            for result, row in zip(report.results, case["results"], strict=True):
                self._derive(report, result, row)
        return value

    def _derive(self, report: CaseReport, result: Result, row: dict[str, Any]) -> None:
        timing = result.timing
        row |= {
            "images_per_s": report.images_per_s(result),
            "speedup": report.speedup(result, self.baseline),
            "ms": {"p20": timing.p20, "p50": timing.p50, "p80": timing.p80} if timing else None,
            "flops_per_s": report.flops_per_s(result),
            "roof_fraction": report.roof_fraction(result),
        }
        if timing:
            row["samples_ms"] = [round(sample, 4) for sample in timing.samples_ms]
        if result.saved:
            row["saved"]["ratio"] = report.saved_ratio(result, self.baseline)
