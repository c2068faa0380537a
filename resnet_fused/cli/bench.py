"""`resnet-fused bench`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

from resnet_fused._command import (
    UsageError,
    check_backend,
    check_importable,
    check_writable,
    choose_many,
    positive_integer,
    positive_integers,
    resolve_device,
    seconds,
)
from resnet_fused.cli.output import PROGRAM, complain, show
from resnet_fused.measure.cases import DTYPES, MODES, Asked, Case, Dtype

DEFAULT_MODEL, REHEARSED_MODEL = "resnet50", "resnet18"
DEFAULT_CASES: tuple[Asked, ...] = (
    ("infer", 1, "fp32"),
    ("infer", 8, "fp32"),
    ("infer", 8, "bf16"),
    ("train", 4, "fp32"),
)
DEFAULT_BUDGET_S = 240.0
GPU_CASES: tuple[Asked, ...] = (
    ("infer", 256, "bf16"),
    ("train", 256, "bf16"),
    ("infer", 32, "bf16"),
    ("infer", 1, "bf16"),
)
GPU_BUDGET_S = 570.0  # with the tuning: a first run ends within ten minutes
TUNE_S = 180.0
WIDTH = 120  # columns of the widest table
REHEARSED: tuple[Asked, ...] = (("infer", 2, "bf16"), ("train", 2, "bf16"))  # a GPU's stages on a CPU
REHEARSED_SIZE = 64
RESULTS = Path("benchmarks/results")
GENERATED = Path("generated JPEGs")
# What else can be done than to race, and the options that it reads: each other one is refused, not ignored.
CASES = {"model", "mode", "batch", "dtype"}
READS = {
    "compare": set(),
    "roofline": {*CASES, "image_size", "json"},
    "profile": {*CASES, "image_size", "device", "contestants", "backend", "seed", "json", "chart", "no_images"},
    "check": {"device", "backend", "tune", "rounds", "budget", "seed", "no_images"},
    "rehearse": {*CASES, "contestants", "backend", "tune", "budget", "seed", "json", "chart"}
    | {"images", "no_images", "loader", "workers"},
}
ROOFLINE_CASES: tuple[Asked, ...] = (("infer", 256, "bf16"), ("train", 256, "bf16"))


def register(commands: Any) -> None:
    """Add the subcommand to argparse's `commands`."""
    from resnet_fused.bench.contestants import BASELINE, CONTESTANTS

    bench = commands.add_parser(
        "bench",
        help="measure a ResNet in plain PyTorch, torch.compile and resnet_fused, side by side",
        description="Measure a ResNet in plain PyTorch, torch.compile and resnet_fused: same weights, same input, "
        "interleaved rounds, each checked against float64 before it is timed. Without --mode, --batch and --dtype the "
        "default cases run. On a CPU, five minutes at most: inference in fp32 at batch 1 and 8 and in bf16 at batch 8, "
        "then training in fp32 at batch 4. On a GPU, ten minutes at most: for three of them our kernels are checked "
        "and timed there, then come inference at batch 256, 32 and 1 and training at batch 256, in bf16. With any of "
        "the three options, every combination of them runs.",
    )
    add = bench.add_argument_group("what is measured").add_argument
    add("--model", help=f"a torchvision ResNet, or timm:<name> (default: {DEFAULT_MODEL})")
    add("--mode", metavar="MODES", help=f"{', '.join(MODES)}, as a comma list (with --batch or --dtype alone: infer)")
    add("--batch", metavar="SIZES", help="batch sizes, as a comma list (with --mode or --dtype alone: 1,8)")
    add("--dtype", metavar="DTYPES", help=f"{', '.join(DTYPES)}, as a comma list (with --mode or --batch alone: fp32)")
    add("--image-size", default="224", metavar="PIXELS", help="side of the square input (default: %(default)s)")
    add("--device", help="cpu, cuda or cuda:<index> (default: a GPU if there is one)")
    slow = ", ".join(name for name, one in CONTESTANTS.items() if not one.by_default)
    names = f"comma list of {', '.join(CONTESTANTS)} (default: all that can run but {slow}; {BASELINE}, the baseline, "
    names += "always runs)"
    add("--contestants", metavar="NAMES", help=names)
    add("--backend", default="auto", help="the kernels that fused and frozen use: auto, aten (native PyTorch), triton, "
        "cuda, cudnn (freeze only) or reference (default: %(default)s)")  # fmt: skip
    add("--tune", action=argparse.BooleanOptionalAction, help="check and time our kernels on this GPU first, "
        f"{TUNE_S:g} s at most (default: with a GPU's default cases)")  # fmt: skip
    add("--rounds", metavar="N", help="timed rounds a case (default: as many as fit)")
    budget = "the first case always runs; later ones that would end after this are left out; like 90s or 5m, a number "
    budget += f"alone is seconds (default cases: {DEFAULT_BUDGET_S:g}s, on a GPU {GPU_BUDGET_S:g}s; else no limit)"
    add("--budget", metavar="TIME", help=budget)
    add("--seed", type=int, default=0, metavar="N", help="of the random weights and inputs (default: %(default)s)")
    add = bench.add_argument_group("also").add_argument
    add("--images", type=Path, metavar="DIR", help="compare plain and fused models on the pictures of this folder "
        "(default: scikit-learn's two sample photographs)")  # fmt: skip
    add("--no-images", action="store_true", help="compare them on no pictures")
    loader = "training fed from a folder of pictures (one folder a class); without DIR from generated ones"
    add("--loader", type=Path, nargs="?", const=GENERATED, metavar="DIR", help=loader)
    add("--workers", metavar="N", help="processes that load for --loader (default: one a core on a GPU; on a CPU none)")
    add = bench.add_argument_group("where the result goes, beside the table").add_argument
    add("--json", type=Path, metavar="FILE", help="results and provenance as JSON")
    add("--chart", type=Path, metavar="FILE", help="a PNG")
    group = bench.add_argument_group("what else to do, or to do instead (one of these)")
    only = group.add_mutually_exclusive_group().add_argument
    only(
        "--record",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="DIR",
        help=f"add the result to a folder of results (default: {RESULTS})",
    )
    only("--compare", type=Path, nargs=2, metavar=("A", "B"), help="measure nothing: two result files side by side")
    check = "measure the cases of this device's last recorded result again; exit code 1 where fused or frozen lost, 2 "
    check += "where there is none"
    only("--check", type=Path, nargs="?", const=RESULTS, metavar="DIR", help=check)
    only(
        "--rehearse",
        action="store_true",
        help="every stage of a run on a GPU, small and on this CPU, to see that it works: its numbers say nothing",
    )
    only("--profile", action="store_true", help="where a step's time goes, layer by layer, and the least it could be")
    only("--roofline", action="store_true", help="measure nothing: count bytes and FLOP layer by layer")
    bench.set_defaults(function=run, default=bench.get_default)


def run(arguments: argparse.Namespace) -> int:
    """Measure, compare, check or profile; the exit status is 1 where nothing was measured, or something was lost."""
    try:
        from rich.console import Console

        from resnet_fused.bench import chart, results, run, schema, subcommands, table
        from resnet_fused.measure.progress import Reporter
    except ImportError as error:
        return complain(f"bench needs the extra packages of `pip install 'resnet_fused[bench]'`: {error}")
    from resnet_fused.dispatch import use_backend

    for name in ("torch.utils.cpp_extension", "torch.fx._symbolic_trace"):  # remarks of torch.compile's, once a run
        logging.getLogger(name).setLevel(logging.ERROR)
    refuse_ignored(arguments)
    out = Console()
    out.width = max(out.width, WIDTH)  # a narrower terminal wraps what it cannot show, rich would cut it
    if arguments.roofline:
        return _roofline(arguments, out)

    def measure(options: run.Options, keep: Callable[[results.Report], object] = lambda report: None) -> results.Report:
        with Reporter(Console(stderr=True), options.steps()) as reporter, use_backend(options.backend):
            return run.run(options, reporter, keep)

    def keep(report: results.Report) -> None:
        """What was measured is on the disk, whatever happens to this process."""
        if arguments.json:
            with contextlib.suppress(OSError):
                results.write_json(report.to_json(), arguments.json)

    if arguments.compare:
        return subcommands.compare_files(arguments.compare, out)
    options = options_of(arguments)
    if arguments.check:
        return subcommands.check(options, arguments.check, measure, out)
    if arguments.profile:
        return _profile(arguments, options, out)
    report = measure(options, keep)
    status = 130 if report.interrupted else 0 if report.measured else 1
    return show(
        out,
        status,
        lambda: table.render(report, out),
        ("--json", arguments.json, lambda path: results.write_json(report.to_json(), path)),
        ("--chart", arguments.chart, lambda path: chart.save(report, path)),
        ("--record", arguments.record, lambda folder: schema.record(report, folder)),
    )


def refuse_ignored(arguments: argparse.Namespace) -> None:
    """Raise UsageError where an option was given that what is to be done does not read."""
    instead = next((name for name in READS if getattr(arguments, name)), None)
    if instead is None:
        return
    given = [name for name, value in vars(arguments).items() if value != arguments.default(name)]
    ignored = [name for name in given if name not in {*READS[instead], instead, "command", "argv"}]
    if ignored:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
        read = ", ".join(sorted(f"--{name.replace('_', '-')}" for name in READS[instead])) or "no option"
        raise UsageError(f"--{instead} does not read {options}; it reads {read}")


def _profile(arguments: argparse.Namespace, options: Any, out: Any) -> int:
    from rich.console import Console

    from resnet_fused.bench import profile_view, results, subcommands
    from resnet_fused.dispatch import use_backend
    from resnet_fused.measure.progress import Reporter

    with Reporter(Console(stderr=True), None) as reporter, use_backend(options.backend):
        found, facts = subcommands.profile_cases(options, reporter)
    content = {"schema": 1, "provenance": facts, "cases": [one.to_json() for one in found]}
    return show(
        out,
        0 if any(one.contestants or one.others for one in found) else 1,
        lambda: profile_view.render(found, facts, out),
        ("--json", arguments.json, lambda path: results.write_json(content, path)),
        ("--chart", arguments.chart, lambda path: profile_view.save(found, facts, path)),
    )


def _roofline(arguments: argparse.Namespace, out) -> int:  # type: ignore[no-untyped-def]
    from resnet_fused.bench import roofline
    from resnet_fused.bench.results import write_json

    chosen = _chosen_cases(arguments) or ROOFLINE_CASES
    size = positive_integer(arguments.image_size, "--image-size")
    check_writable("--json", arguments.json)
    found = roofline.rooflines(_model(arguments), chosen, size)

    def render() -> None:
        for one in found:
            roofline.render(one, out)
        out.print(roofline.IN_WORDS, highlight=False)

    content = {"schema": 1, "cases": [one.to_json() for one in found]}
    return show(out, 0, render, ("--json", arguments.json, lambda path: write_json(content, path)))


def _model(arguments: argparse.Namespace) -> str:
    return arguments.model or (REHEARSED_MODEL if arguments.rehearse else DEFAULT_MODEL)


def _chosen_cases(arguments: argparse.Namespace) -> tuple[Asked, ...]:
    """The cases that --mode, --batch and --dtype name; none without any of them."""
    if not (arguments.mode or arguments.batch or arguments.dtype):
        return ()
    modes = choose_many(arguments.mode or "infer", MODES, "mode")
    batches = positive_integers(arguments.batch or "1,8", "--batch")
    dtypes: tuple[Dtype, ...] = choose_many(arguments.dtype or "fp32", get_args(Dtype), "dtype")
    return tuple((mode, batch, dtype) for mode in modes for dtype in dtypes for batch in batches)


def options_of(arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    """Check every choice before anything is built; raises UsageError."""
    from resnet_fused.bench import contestants, loader, run
    from resnet_fused.measure import models, network

    device = resolve_device(arguments.device)
    models.check(_model(arguments))
    check_backend(arguments.backend, device)
    graphs = device.type == "cuda"  # elsewhere every loop is a plain one
    entrants = tuple(
        name for name, one in contestants.CONTESTANTS.items() if one.by_default and (one.graphed or graphs)
    )
    if arguments.contestants:
        known = contestants.PROFILED if arguments.profile else contestants.CONTESTANTS
        entrants = choose_many(arguments.contestants, known, "contestant")
    size = positive_integer(arguments.image_size, "--image-size")
    rounds = positive_integer(arguments.rounds, "--rounds") if arguments.rounds else None
    chosen, as_on_gpu = _chosen_cases(arguments), device.type == "cuda" or arguments.rehearse
    by_default = not (chosen or arguments.check or arguments.profile)  # else all that was asked for is measured
    budget = seconds(arguments.budget, "--budget") if arguments.budget else None
    if budget is None and by_default:
        budget = GPU_BUDGET_S if as_on_gpu else DEFAULT_BUDGET_S
    if arguments.rehearse:
        device, size, rounds = torch.device("cpu"), REHEARSED_SIZE, 1
    chosen = chosen or (REHEARSED if arguments.rehearse else GPU_CASES if as_on_gpu else DEFAULT_CASES)
    tunes = arguments.tune if arguments.tune is not None else by_default and as_on_gpu and arguments.backend == "auto"
    if tunes and not as_on_gpu:
        raise UsageError(
            f"--tune is for a GPU, and the device is {device}; --rehearse runs every step of it on the CPU"
        )
    if not -(2**63) <= arguments.seed < 2**63:
        raise UsageError(f"--seed {arguments.seed} is not an integer of 64 bits")
    entry = arguments.record and arguments.record / "new.json"
    for option, path in (("--json", arguments.json), ("--chart", arguments.chart), ("--record", entry)):
        check_writable(option, path)
    if arguments.chart:
        check_importable("--chart", "matplotlib")
    for option, wanted in (("--images", arguments.images), ("--loader", arguments.loader)):
        if wanted:
            check_importable(option, "PIL", "torchvision")
    if arguments.images and arguments.no_images:
        raise UsageError("--images and --no-images contradict each other")
    source = None
    if arguments.workers and not arguments.loader:
        raise UsageError(f"--workers {arguments.workers} goes with --loader, which was not given")
    if arguments.loader:
        if all(mode != "train" for mode, *_ in chosen):
            raise UsageError("--loader measures training, and no case does: add --mode train")
        workers = positive_integer(arguments.workers, "--workers") if arguments.workers else None
        source = loader.Source(None if arguments.loader == GENERATED else arguments.loader, workers)
        if source.folder is not None:
            loader.check(source.folder)
    network.check_size(_model(arguments), size)
    return run.Options(
        model=_model(arguments),
        cases=tuple(Case(_model(arguments), *case, str(device), size) for case in chosen),
        device=device,
        contestants=entrants,
        images=arguments.images,
        pictures=not (arguments.no_images or arguments.check),
        loader=source,
        rounds=rounds,
        budget_s=budget,
        seed=arguments.seed,
        backend=arguments.backend,
        command=shlex.join([PROGRAM, *arguments.argv]),
        tune_s=TUNE_S if tunes else None,
        rehearse=arguments.rehearse,
    )
