"""The results of a run, and their JSON form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from resnet_fused._command import write_atomically as write_atomically  # for whoever writes results
from resnet_fused._command import write_json as write_json
from resnet_fused.bench.correctness import Errors
from resnet_fused.measure.cases import Case
from resnet_fused.measure.roof import Roof
from resnet_fused.measure.timing import Timing

SCHEMA = 1
INTERRUPTED = "interrupted"  # how a line of what was left out ends


@dataclasses.dataclass(frozen=True)
class Result:
    """One contestant on one case. Only `status == "ok"` carries a speed."""

    contestant: str
    status: str  # "ok", "failed" (wrong, or raised) or "unavailable"
    reason: str | None = None
    errors: Errors | None = None
    setup_s: float | None = None
    timing: Timing | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None  # by autograd, in training


@dataclasses.dataclass(frozen=True)
class CaseReport:
    """All contestants on one case, in the order of the table."""

    case: Case
    flops: int | None  # of a step; None where they could not be counted
    rounds: int
    results: tuple[Result, ...]
    roof: Roof | None = None
    conditions: dict[str, Any] | None = None  # clocks and throttling while it was timed, where a GPU tells

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
    provenance: dict[str, Any]
    cases: tuple[CaseReport, ...]
    left_out: tuple[str, ...] = ()
    pictures: dict[str, Any] | None = None
    loader: tuple[dict[str, Any], ...] = ()  # training fed by a real input pipeline

    def geometric_means(self, mode: str) -> dict[str, tuple[float, int]]:
        """By contestant: the geometric mean of its speed-ups over the cases of `mode`, and over how many of them."""
        logs: dict[str, list[float]] = {}
        for report in self.cases:
            for result in report.results if report.case.mode == mode else ():
                speedup = report.speedup(result, self.baseline)
                if speedup:
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
        """JSON-ready values; an infinite error is the string "inf"."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "baseline": self.baseline,
            "provenance": self.provenance,
            "cases": [self._case_json(report) for report in self.cases],
            "left_out": list(self.left_out),
            "geometric_mean_speedup": {
                mode: {
                    name: {"speedup": mean, "cases": count}
                    for name, (mean, count) in self.geometric_means(mode).items()
                }
                for mode in self.modes()
            },
            "pictures": self.pictures,
            "loader": list(self.loader),
        }

    def _case_json(self, report: CaseReport) -> dict[str, Any]:
        roof = report.roof
        return {
            **dataclasses.asdict(report.case),
            "rounds": report.rounds,
            "flops_per_step": report.flops,
            "roof_flops_per_s": {"gemm": roof.gemm, "conv": roof.conv} if roof else None,
            "conditions": report.conditions,
            "results": [self._result_json(report, result) for result in report.results],
        }

    def _result_json(self, report: CaseReport, result: Result) -> dict[str, Any]:
        timing, rate = result.timing, report.flops_per_s(result)
        errors = dataclasses.asdict(result.errors) if result.errors else None
        return {
            "contestant": result.contestant,
            "status": result.status,
            "reason": result.reason,
            "images_per_s": report.images_per_s(result),
            "speedup": report.speedup(result, self.baseline),
            "ms": {"p20": timing.p20, "p50": timing.p50, "p80": timing.p80} if timing else None,
            "samples_ms": [round(sample, 4) for sample in timing.samples_ms] if timing else None,
            "setup_s": result.setup_s,
            "peak_bytes": result.peak_bytes,
            "saved": {"bytes": result.saved_bytes, "ratio": report.saved_ratio(result, self.baseline)}
            if result.saved_bytes is not None
            else None,
            "flops_per_s": rate,
            "roof_fraction": rate / report.roof.best if rate and report.roof else None,
            "errors": {k: "inf" if v == float("inf") else v for k, v in errors.items()} if errors else None,
        }
