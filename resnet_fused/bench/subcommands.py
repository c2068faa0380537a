"""What `resnet-fused bench` does besides measuring: compare two results, hold a run against the last, profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from resnet_fused._command import one_line
from resnet_fused.bench import compare, profile, schema
from resnet_fused.bench.contestants import BASELINE, CONTESTANTS, PROFILED
from resnet_fused.bench.results import Report
from resnet_fused.bench.run import Options
from resnet_fused.measure import models, network, provenance
from resnet_fused.measure.progress import Reporter


def compare_files(paths: Sequence[Path], out: Console) -> int:
    """Print two result files side by side.

    Raises:
        UsageError: one of them is no result, or they have no case in common.
    """
    first, second = paths
    comparison = compare.compare(schema.load(first), schema.load(second))
    compare.render(comparison, (str(first), str(second)), out)
    return 0


def check(options: Options, folder: Path, run: Callable[[Options], Report], out: Console) -> int:
    """Run the cases of this device's last recorded result again; 1 where we lost beyond the spread, or had no time,
    2 where there is none.

    Args:
        options: the request; its model, cases and contestants are replaced by the recorded ones.
        folder: of the recorded results.
        run: measures a request.

    Raises:
        UsageError: a recorded result cannot be read.
    """
    facts = provenance.collect(options.device, options.command)
    found = schema.last(folder, facts)
    device = provenance.device_name(facts)
    if found is None:
        out.print(
            f"[yellow]no recorded result for {escape(device)} below {escape(str(folder))}[/yellow]: nothing checked; "
            f"`resnet-fused bench --record {escape(str(folder))}` makes one",
            soft_wrap=True,
            highlight=False,
        )
        return 2
    path, then = found
    names = {result.contestant for case in then.cases for result in case.results}
    ours = tuple(name for name in (BASELINE, *compare.OURS) if name in names)
    cases = tuple(dataclasses.replace(case.case, device=str(options.device)) for case in then.cases)
    now = run(dataclasses.replace(options, model=then.model, cases=cases, contestants=ours))
    compare.render(compare.compare(_only(then, ours), now), (str(path), "now"), out)
    lost = [f"lost {line}" for line in compare.losses(then, now)] + [f"not measured: {x}" for x in now.left_out]
    for line in lost:
        out.print(f"[red]{escape(line)}[/red]", soft_wrap=True, highlight=False)
    if not lost:
        out.print(f"nothing lost since {escape(str(path))}", soft_wrap=True, highlight=False)
    return 1 if lost else 0


def _only(report: Report, names: tuple[str, ...]) -> Report:
    """A report with these contestants alone."""
    cases = tuple(
        dataclasses.replace(case, results=tuple(r for r in case.results if r.contestant in names))
        for case in report.cases
    )
    return dataclasses.replace(report, cases=cases)


def profile_cases(options: Options, reporter: Reporter) -> tuple[list[profile.CaseProfile], provenance.Provenance]:
    """Where the steps of these cases go, and the provenance of that. A case that fails has its reason in it.

    Raises:
        UsageError: the model is no ResNet that the cost model knows.
    """
    names = dict.fromkeys(name for name in (BASELINE, *options.contestants) if name in PROFILED)
    facts = provenance.collect(options.device, options.command)
    model = models.create(options.model, options.seed)
    networks = {size: network.describe(model, size) for size in {case.image_size for case in options.cases}}
    found = []
    known: dict[str, tuple[float, float]] = {}
    for case in options.cases:
        entrants = [name for name in names if case.mode in CONTESTANTS[name].modes]
        try:
            if case.dtype not in known:
                reporter.start(f"measuring the roofs of {options.device} in {case.dtype}")
                known[case.dtype] = profile.roofs(case)
            reporter.start(f"{case.label}: profiling {', '.join(entrants)}")
            found.append(profile.measure(model, networks[case.image_size], case, entrants, *known[case.dtype]))
        except Exception as error:  # a dtype without kernels on this device: nobody can run
            failures = tuple((name, one_line(error, kind=True)) for name in entrants)
            found.append(profile.CaseProfile(case, networks[case.image_size], 0.0, 0.0, {}, (), (), failures))
    return found, facts
