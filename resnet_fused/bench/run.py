"""A bench run: correctness first, then speed, then the pictures.

Every case, contestant and stage fails alone: what went wrong is in its row, and what was measured is in the report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from resnet_fused._command import one_line
from resnet_fused.bench import images, loader, preparation
from resnet_fused.bench.contestants import BASELINE, CONTESTANTS, Contestant, Unavailable
from resnet_fused.bench.correctness import CHECKED_IMAGES, Errors, breach, errors_of, top1_agreement
from resnet_fused.bench.results import INTERRUPTED, SCHEMA, CaseReport, Report, Result, Saved
from resnet_fused.bench.runner import GraphMemory, Outcome, Runner, reference
from resnet_fused.measure import memory, models, provenance, roof
from resnet_fused.measure.activation_memory import saved_bytes
from resnet_fused.measure.cases import Case
from resnet_fused.measure.progress import Reporter
from resnet_fused.measure.telemetry import GpuTelemetry
from resnet_fused.measure.timing import REST_S, Call, Measured, clock_for, time_interleaved

PICTURE_BATCH = 8
TIMED_SECONDS = 12.0
ROOF_REPEATS = 8  # at most: no more than there are rounds
TRAINING_SETUP = 3.0  # how much longer than inference's a training case's set-up takes, roughly


@dataclasses.dataclass(frozen=True)
class Options:
    """A validated request."""

    model: str
    cases: tuple[Case, ...]
    device: torch.device
    contestants: tuple[str, ...]
    images: Path | None = None
    pictures: bool = True
    loader: loader.Source | None = None
    rounds: int | None = None
    budget_s: float | None = None
    seed: int = 0
    backend: str = "auto"
    command: str = ""
    tune_s: float | None = None  # check and time our kernels first, for so long at most
    rehearse: bool = False

    def steps(self) -> int:
        """How many steps `run` reports."""
        loaded = sum(case.mode == "train" for case in self.cases) if self.loader else 0
        tuned = len({case.dtype for case in self.cases}) if self.tune_s is not None else 0
        return 2 + tuned + self.pictures + loaded + sum(len(self.entrants(case)) + 1 for case in self.cases)

    def entrants(self, case: Case) -> list[Contestant]:
        """The contestants of a case; the baseline is always one."""
        names = dict.fromkeys([*self.contestants, BASELINE])
        return [
            contestant for name, contestant in CONTESTANTS.items() if name in names and case.mode in contestant.modes
        ]


def run(options: Options, reporter: Reporter, keep: Callable[[Report], object] = lambda report: None) -> Report:
    """Measure everything that was asked for.

    Args:
        options: what.
        reporter: gets `start(text)` per step and `detail(text)`.
        keep: called after each case with the report so far, so that nothing that was measured can be lost.

    Returns:
        The report; after a KeyboardInterrupt that of the cases that were done, if there are any.

    Raises:
        UsageError: an unreadable picture, or a model that cannot be built.
    """
    start = time.monotonic()
    facts = provenance.collect(options.device, options.command)  # first: it notes the load others put on the machine
    pictures = None
    if options.pictures:
        pictures = images.load_folder(options.images) if options.images else images.load_samples()
    benchmark_before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    reports: list[CaseReport] = []
    loaded: list[loader.Row] = []
    agreement: images.Pictures | None = None
    kernels = preparation.untuned(options.device)
    if options.tune_s is not None:
        what = (options.tune_s, options.rehearse, options.command)
        kernels = preparation.prepare(options.model, options.cases, *what, reporter)

    def report() -> Report:
        cases = tuple(dataclasses.replace(one, roof_flops_per_s=race.roofs.get(one.dtype)) for one in reports)
        return Report(
            schema=SCHEMA,
            model=options.model,
            baseline=BASELINE,
            provenance=facts,
            cases=cases,
            left_out=tuple(race.left_out),
            pictures=agreement,
            loader=tuple(loaded),
            kernels=kernels,
        )

    try:
        limit = f"aiming at {options.budget_s:g} s" if options.budget_s else "without a limit: --budget sets one"
        count = len(options.cases)
        reporter.start(f"creating {options.model}; {count} case{'s' * (count > 1)} to measure, {limit}")
        model = models.create(options.model, options.seed)
        reporter.start(f"measuring the fastest arithmetic of {options.device}, the roof")
        race = _Race(options, model, reporter, start)
        for dtype in {case.dtype for case in options.cases}:
            race.measure_roof(dtype)
        try:
            for case in options.cases:
                if found := race.run_case(case):
                    reports.append(found)
                    keep(report())
            for rows in _load_and_train(options, model, reports, reporter):
                loaded += rows
            if pictures is not None:
                reporter.start("real pictures through plain and fused models")
                agreement = _compare_pictures(options, model, pictures)
        except KeyboardInterrupt:
            if not reports:
                raise
            done = {one.case for one in reports}
            undone = [case.label for case in options.cases if case not in done] or ["loader and pictures"]
            race.left_out += [f"{what}: {INTERRUPTED}" for what in undone]
    finally:
        torch.backends.cudnn.benchmark = benchmark_before
    return report()


class _Race:
    """What the cases of one run share: the model, the inputs, float64's answers, the time left."""

    def __init__(self, options: Options, model: nn.Module, reporter: Reporter, start: float) -> None:
        self.options, self.model, self.reporter = options, model, reporter
        self.deadline = start + options.budget_s if options.budget_s else None
        self.left_out: list[str] = []
        self.roofs: dict[str, roof.Roof] = {}
        self.setup_s = 0.0  # the longest set-up of a case so far, as of inference
        self.pending = list(options.cases)
        self.references: dict[tuple[str, int, int], Outcome] = {}
        self.activations: dict[tuple[str, int], int] = {}  # elements per image, by mode and size

    def measure_roof(self, dtype: str) -> None:
        """Measure a dtype's roof, or raise it: the best of all attempts counts, and they are spread over the run."""
        try:
            found = roof.measure(dtype, self.options.device, min(ROOF_REPEATS, self.options.rounds or ROOF_REPEATS))
        except Exception:  # a dtype without kernels on this device, or no memory left for it
            return
        before = self.roofs.get(dtype, found)
        self.roofs[dtype] = roof.Roof(max(before.gemm, found.gemm), max(before.conv, found.conv))

    def run_case(self, case: Case) -> CaseReport | None:
        budget = self._seconds_for(case)
        if budget is None:
            self.left_out.append(f"{case.label}: no time left in --budget {self.options.budget_s:g}")
            return None
        began = time.monotonic()
        entrants = self.options.entrants(case)
        try:
            pixels, labels = self._input(case)
            judge = self._reference(case, pixels, labels)
            shared = None
            if case.mode == "train" and torch.device(case.device).type == "cuda":
                shared = GraphMemory(torch.device(case.device))
        except Exception as error:  # no input, or no judge: nobody can run
            reason = one_line(error, kind=True)
            failed = tuple(Result(one.name, "failed", reason) for one in entrants)
            return CaseReport.of(case, rounds=0, results=failed)
        labels = labels % judge.logits.shape[1]
        built = [self._build(contestant, case, pixels, labels, judge, shared) for contestant in entrants]
        plain = [result.errors for _, result in built if result.errors and CONTESTANTS[result.contestant].plain]
        results = {result.contestant: _judged(result, plain, case.dtype) for _, result in built}
        calls: dict[str, Call] = {}
        for runner, result in built:
            if runner and results[result.contestant].status == "ok":
                calls[result.contestant] = runner.step
        setup = time.monotonic() - began
        self.setup_s = max(self.setup_s, setup / (TRAINING_SETUP if case.mode == "train" else 1.0))

        self.reporter.start(f"{case.label}: timing {', '.join(calls) or 'nobody'}")
        with GpuTelemetry(torch.device(case.device)) as watch:
            measured = self._time(case, calls, budget)
        for name, timing in measured.timings.items():
            results[name] = dataclasses.replace(results[name], samples_ms=timing.samples_ms)
        for name, reason in measured.failures.items():
            results[name] = dataclasses.replace(results[name], status="failed", reason=reason)
        self.measure_roof(case.dtype)
        return CaseReport.of(
            case,
            rounds=measured.rounds,
            results=tuple(results.values()),
            flops_per_step=self._flops(case),
            conditions=watch.seen(),
        )

    def _time(self, case: Case, calls: dict[str, Call], budget: float) -> Measured:
        rehearsal = self.options.rounds == 1
        try:
            return time_interleaved(
                calls,
                clock_for(torch.device(case.device)),
                rounds=self.options.rounds,
                budget_s=budget,
                warmup=0 if rehearsal else 2,
                rest_s=0 if rehearsal or torch.device(case.device).type != "cpu" else REST_S,
                on_round=lambda done: self.reporter.detail(f"round {done}"),
            )
        except Exception as error:  # a GPU that has no memory left for the clock
            return Measured({}, dict.fromkeys(calls, one_line(error, kind=True)), 0)

    def _flops(self, case: Case) -> int | None:
        try:
            return roof.flops(self.model, case)
        except Exception:  # of a model that does not run on shapes alone
            return None

    def _input(self, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        """Pixels and labels; raises MemoryError where they would not fit."""
        pixels = 4 * 3 * case.image_size**2
        memory.require(case.batch * pixels)
        generator = torch.Generator().manual_seed(self.options.seed)
        shape = (case.batch, 3, case.image_size, case.image_size)
        return torch.randn(shape, generator=generator), torch.randint(1000, (case.batch,), generator=generator)

    def _require_memory(self, case: Case, images: int, width: int) -> None:
        """Raise MemoryError where a step on so many images, `width` bytes a number, would not fit beside all else.

        A GPU that runs out of memory raises an error of its own.
        """
        if torch.device(case.device).type != "cpu":
            return
        key = (case.mode, case.image_size)
        if key not in self.activations:
            try:
                self.activations[key] = memory.activations(self.model, *key)
            except Exception:  # of a model that does not run on shapes alone
                self.activations[key] = 0
        memory.require(images * width * (3 * case.image_size**2 + self.activations[key]))

    def _seconds_for(self, case: Case) -> float | None:
        """Seconds of timed rounds for this case; None when not even its set-up fits into what is left."""
        self.pending.remove(case)
        if self.deadline is None or not self.setup_s:
            return TIMED_SECONDS

        def needed(other: Case) -> float:
            return self.setup_s * (TRAINING_SETUP if other.mode == "train" else 1.0)

        left = self.deadline - time.monotonic() - needed(case)
        spare = left - sum(map(needed, self.pending))
        return None if left < 0 else min(TIMED_SECONDS, max(0.0, spare / (len(self.pending) + 1)))

    def _reference(self, case: Case, pixels: torch.Tensor, labels: torch.Tensor) -> Outcome:
        count = min(case.batch, CHECKED_IMAGES)
        key = (case.mode, count, case.image_size)
        if key not in self.references:
            self._require_memory(case, count, 8)
            self.references[key] = reference(self.model, case, pixels[:count], labels[:count])
        return self.references[key]

    def _build(
        self,
        contestant: Contestant,
        case: Case,
        pixels: torch.Tensor,
        labels: torch.Tensor,
        judge: Outcome,
        shared: GraphMemory | None,
    ) -> tuple[Runner | None, Result]:
        """Build a contestant, run it once against float64, and measure the memory of one step."""
        self.reporter.start(f"{case.label}: {contestant.name} against float64")
        try:
            self._require_memory(case, case.batch, case.torch_dtype.itemsize)
            meter = memory.MemoryMeter(torch.device(case.device))
            start = time.perf_counter()
            runner = Runner(contestant, self.model, case, pixels, labels, shared)
            outcome = runner.evaluate(min(case.batch, CHECKED_IMAGES))
            setup_s = time.perf_counter() - start
            errors = errors_of(outcome, judge)
            agreement = top1_agreement(outcome.logits, judge.logits) if contestant.quantised else None
            runner.step_by_step()
            peak = meter.peak(runner.step_by_step)  # a graph's memory is shared, so nobody's
            runner.warm_up()
            own = [*runner.module.parameters(), *runner.module.buffers()]
            saved = Saved(saved_bytes(runner.loss, own)) if case.mode == "train" else None
        except Unavailable as reason:
            return None, Result(contestant.name, "unavailable", str(reason))
        except Exception as error:  # whatever a contestant raises is its result
            return None, Result(contestant.name, "failed", one_line(error, kind=True))
        return runner, Result(
            contestant.name, "ok", errors=errors, setup_s=setup_s, peak_bytes=peak, saved=saved, agreement=agreement
        )


def _load_and_train(
    options: Options, model: nn.Module, reports: list[CaseReport], reporter: Reporter
) -> Iterator[list[loader.Row]]:
    """Training from the loader of every contestant that was right, case by case."""
    if options.loader is None:
        return
    with contextlib.ExitStack() as stack:
        folder: Path | None = None
        for case in reports:
            names = [result.contestant for result in case.results if result.timing]
            if case.mode != "train" or not names:
                continue
            reporter.start(f"{case.label}: from the loader to the loss, {', '.join(names)}")
            try:
                folder = folder or stack.enter_context(loader.opened(options.loader))
                yield _loaded(options, model, case, names, folder, reporter)
            except Exception as error:  # of the pictures: whoever trains on them
                yield [loader.problem(case, name, one_line(error, kind=True)) for name in names]


def _loaded(
    options: Options, model: nn.Module, case: Case, names: list[str], folder: Path, reporter: Reporter
) -> list[loader.Row]:
    assert options.loader is not None
    generator = torch.Generator().manual_seed(options.seed)
    pixels = torch.randn(case.batch, 3, case.image_size, case.image_size, generator=generator)
    labels = torch.zeros(case.batch, dtype=torch.int64)
    builders = {name: functools.partial(Runner, CONTESTANTS[name], model, case, pixels, labels) for name in names}
    return loader.measure(
        case,
        builders,
        folder,
        options.loader.processes(options.device),
        rounds=options.rounds or loader.ROUNDS,
        on_round=lambda done: reporter.detail(f"round {done}"),
    )


def _judged(result: Result, plain: list[Errors], dtype: str) -> Result:
    """`result`, failed if it breaks the contract: a wrong answer has no speed."""
    contestant = CONTESTANTS[result.contestant]
    if result.errors is None or contestant.plain or contestant.quantised:
        return result
    reason = breach(result.errors, plain, dtype)
    return dataclasses.replace(result, status="failed", reason=reason) if reason else result


def _compare_pictures(options: Options, model: nn.Module, pictures: torch.Tensor) -> images.Pictures:
    """Top-1 agreement and logit differences of the resnet_fused contestants with the baseline, per dtype."""
    source = str(options.images) if options.images else "scikit-learn's two sample photographs"
    found: list[images.Agrees | images.Unknown] = []
    batch = min(len(pictures), PICTURE_BATCH)
    for dtype in dict.fromkeys(case.dtype for case in options.cases):
        case = Case(options.model, "infer", batch, dtype, str(options.device), images.CROP)
        labels = torch.zeros(batch, dtype=torch.int64)

        def logits(name: str, case: Case = case, labels: torch.Tensor = labels) -> torch.Tensor:
            runner = Runner(CONTESTANTS[name], model, case, pictures[:batch], labels)
            return images.logits_of(runner.infer, pictures, batch)

        ours = [name for name in ("fused", "frozen") if name in options.contestants]
        plain, problem = None, ""
        try:
            plain = logits(BASELINE)
        except Exception as error:  # shown, not fatal: the timings stand on their own
            problem = f"{BASELINE}: {one_line(error, kind=True)}"
        for name in ours:
            try:
                if plain is not None:
                    found.append({"contestant": name, "dtype": dtype, **images.compare(logits(name), plain)})
                    continue
            except Unavailable:
                continue  # the table says so
            except Exception as error:
                problem = one_line(error, kind=True)
            found.append({"contestant": name, "dtype": dtype, "problem": problem})
    return {"source": source, "count": len(pictures), "comparisons": found}
