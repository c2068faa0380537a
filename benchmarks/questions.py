"""Single kernels of ours beside PyTorch's own, at ResNet-50's shapes, each against the roof that this GPU showed.

    python -m benchmarks.questions --json out/questions.json

A row a question, shape and kernel: checked against float64, compared with PyTorch's result, then timed side by side
from a cold L2. A process of its own does the work: a kernel that crashes or hangs costs its row, and its formulation is
not tried again. The file is written as it goes; a second call goes on with the rows that are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contests import Contest, Setting, contests
from resnet_fused.bench import answers, provenance, roof
from resnet_fused.bench.answers import Answer
from resnet_fused.bench.cases import DTYPES
from resnet_fused.bench.checks import VERIFIED_IMAGES, check, crashed
from resnet_fused.bench.harness import clock_for, first_line, time_interleaved
from resnet_fused.bench.problems import Operands
from resnet_fused.bench.results import write_json
from resnet_fused.plan import experimental
from resnet_fused.plan.table import Choice

PATIENCE_S = 90  # without a new row, the compilation of its kernels included
ROW_S = 0.3  # of timed rounds
AGREES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-2}  # relative, of the norm of the difference
REPLACED = 4  # the exit status of a worker whose GPU context a kernel has broken
LEFT = 3  # and of one with no time for the rest


def answer(contest: Contest, setting: Setting, bandwidth: float, flops_per_s: float, rounds: int | None) -> Answer:
    """Check, compare and time one row."""
    row = Answer(*contest.key)
    right: list[Choice] = []
    problem = contest.job.problem.with_batch(min(setting.batch, VERIFIED_IMAGES))
    job = dataclasses.replace(contest.job, problem=problem) if contest.op.startswith("conv_") else None
    why = "no candidate"
    for candidate in contest.candidates:
        found = check(problem, contest.op, job, candidate, setting.device)
        if found is None:
            right.append(candidate)
        elif crashed(found):
            return dataclasses.replace(row, problem=f"crashed: {candidate}: {found}")
        else:
            why = f"{candidate}: {found}"
    if not right:
        return dataclasses.replace(row, problem=why)
    make = Operands(setting.device, setting.dtype, guarded=False)
    ours, plain, moved, flops = contest.calls(make, tuple(right))
    for name, call in ours.items() if plain and contest.op == "conv_fprop" else ():
        difference = _difference(call(), next(iter(plain.values()))())
        if not difference <= AGREES[setting.dtype]:
            return dataclasses.replace(row, problem=f"{name} differs from PyTorch's by {difference:.1e}")
    clock = clock_for(setting.device)
    measured = time_interleaved({**plain, **ours}, clock, rounds=rounds, budget_s=ROW_S, warmup=1 if rounds else 3)
    times = {name: timing.p50 for name, timing in measured.timings.items()}
    best = min((name for name in ours if name in times), key=times.__getitem__, default=None)
    if best is None:
        return dataclasses.replace(row, problem="; ".join(measured.failures.values()))
    rival = min((name for name in plain if name in times), key=times.__getitem__, default=None)
    return dataclasses.replace(
        row,
        ours=best,
        ours_ms=times[best],
        plain=rival,
        plain_ms=times[rival] if rival else None,
        least_ms=max(moved / bandwidth, flops / flops_per_s) * 1e3,
    )


def _difference(actual: Tensor, plain: Tensor) -> float:
    return float((actual.float() - plain.float()).norm() / plain.float().norm())


def chosen(setting: Setting, rehearse: bool) -> list[Contest]:
    """The rows; for a rehearsal the first of every question and kernel."""
    found = {contest.key: contest for contest in contests(setting)}
    if rehearse:
        found = {(c.question, c.kernel, c.op): c for c in reversed(found.values())}  # type: ignore[misc]
        return list(reversed(found.values()))
    return list(found.values())


def work(path: Path, rehearse: bool, roofs_only: bool, deadline: float) -> int:
    """The worker: measure the roofs, then row by row; what it is about to try is in the file before it tries."""
    setting = Setting.here(rehearse)
    torch.backends.cudnn.benchmark = True
    data = _read(path)
    if "provenance" not in data:
        dtype = next(name for name, value in DTYPES.items() if value == setting.dtype)
        often = 1 if rehearse else 8
        ceiling = roof.measure(dtype, setting.device, often)
        bandwidth = roof.copy_bandwidth(setting.device, often)
        data["provenance"] = provenance.collect(setting.device, "python -m benchmarks.questions")
        data["roofs"] = {
            "dtype": dtype,
            "copy_bytes_per_s": bandwidth,
            "gemm_flops_per_s": ceiling.gemm,
            "conv_flops_per_s": ceiling.conv,
        }
        write_json(data, path)
    if roofs_only:
        return 0
    roofs = data["roofs"]
    peak = max(roofs["gemm_flops_per_s"], roofs["conv_flops_per_s"])
    rows = {row.key: row for row in answers.from_json(data)}
    todo = chosen(setting, rehearse)
    data["questions"] = len(todo)
    for contest in todo:
        if contest.key in rows:
            continue
        if time.time() > deadline:
            return LEFT
        out = [row for row in rows.values() if row.kernel == contest.kernel and _fatal(row)]
        if out and contest.kernel in experimental.KERNELS:
            rows[contest.key] = Answer(*contest.key, problem=f"not tried: {out[0].problem} at {out[0].shape}"[:120])
            continue
        data["attempt"] = contest.key
        write_json(data, path)
        try:
            row = answer(contest, setting, roofs["copy_bytes_per_s"], peak, 1 if rehearse else None)
        except Exception as error:  # whatever a kernel raises is its answer
            what = first_line(error)
            row = Answer(*contest.key, problem=f"crashed: {what}" if crashed(what) else what)
        rows[contest.key] = row
        data["answers"], data["attempt"] = [dataclasses.asdict(row) for row in rows.values()], None
        write_json(data, path)
        if (row.problem or "").startswith("crashed"):
            return REPLACED
    data["answers"] = [dataclasses.asdict(row) for row in rows.values()]
    write_json(data, path)
    return 0


def _fatal(row: Answer) -> bool:
    return (row.problem or "").startswith(("hung", "crashed"))


def _read(path: Path) -> dict[str, Any]:
    """The file as far as it is; a worker's last row may be missing, never half there."""
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        data = {}
    return data if data.get("schema") == answers.SCHEMA else {"schema": answers.SCHEMA, "answers": []}


def supervise(command: list[str], path: Path, patience_s: float = PATIENCE_S) -> int:
    """Run workers until one ends by itself; a row on which one crashed or hung is noted, and the next goes on.

    Returns:
        0: all is answered; 3: time ran out; 1: a worker died before it tried anything.
    """
    while True:
        process = subprocess.Popen(command, start_new_session=True)
        try:
            stamp, since = _stamp(path), time.monotonic()
            hung = False
            while process.poll() is None and not hung:
                time.sleep(0.1)
                if _stamp(path) != stamp:
                    stamp, since = _stamp(path), time.monotonic()
                hung = time.monotonic() - since > patience_s
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode in (0, LEFT):
            return process.returncode
        if process.returncode == REPLACED:
            continue
        data = _read(path)
        attempt = data.get("attempt")
        if not attempt:
            return 1
        what = f"hung: nothing for {patience_s:g} s" if hung else f"crashed: exit status {process.returncode}"
        question, shape, kernel = attempt
        data["answers"].append(dataclasses.asdict(Answer(question, shape, kernel, problem=what)))
        data["attempt"] = None
        write_json(data, path)


def _stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def summary(data: dict[str, Any]) -> Iterator[str]:
    """The table, the geometric means, and a last line."""
    rows = answers.from_json(data)
    yield from answers.lines(rows)
    for (question, kernel), (mean, count, faster) in answers.geometric_means(rows).items():
        yield f"{question}, {kernel}: geometric mean {mean:.2f}x of PyTorch's own, faster in {faster} of {count}"
    roofs = data["roofs"]
    yield (
        f"roofs: copy {roofs['copy_bytes_per_s'] / 1e9:.0f} GB/s; {roofs['dtype']} matrix product "
        f"{roofs['gemm_flops_per_s'] / 1e12:.1f}, 3x3 convolution {roofs['conv_flops_per_s'] / 1e12:.1f} TFLOP/s"
    )
    if "questions" in data:
        wrong = sum(row.problem is not None for row in rows)
        left = data["questions"] - len(rows)
        yield f"{len(rows)} rows answered, {wrong} without a time" + (f", {left} left for the next call" * bool(left))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 all is answered, or the rest left for the next call; 1 not; 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.questions", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the rows; a call goes on with these")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin no row after so long")
    parser.add_argument("--roofs", action="store_true", help="measure the roofs, and ask nothing")
    parser.add_argument("--rehearse", action="store_true", help="a few tiny rows on a CPU; proves nothing about a GPU")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of a worker: the time of day to end at
    options = parser.parse_args(argv)
    if not (options.rehearse or torch.cuda.is_available()):
        parser.error("no CUDA GPU here; --rehearse asks a few of them on the CPU")
    if options.until is not None:
        return work(options.json, options.rehearse, options.roofs, options.until)
    flags = ["--rehearse"] * options.rehearse + ["--roofs"] * options.roofs
    until = str(time.time() + options.budget)
    status = supervise(
        [sys.executable, "-m", "benchmarks.questions", "--json", str(options.json), "--until", until, *flags],
        options.json,
    )
    data = _read(options.json)
    if "roofs" in data:
        print("\n".join(summary(data)))
    return status if status == 1 else 0


if __name__ == "__main__":
    sys.exit(main())
