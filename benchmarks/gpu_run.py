"""Everything that only a GPU can tell, in one command: build, check, verify, tune, measure.

    python -m benchmarks.gpu_run --minutes 9 --out out/gpu

Steps run in order of value, each in a process of its own with a limit of time, and everything is written as it goes:
`state.json`, `log.txt`, one file a step. A second call goes on where the first had to stop. Nothing is fetched.
`--rehearse` runs every step, tiny, on a CPU: it shows that the command works, and says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from resnet_fused import _library
from resnet_fused.bench.results import write_atomically, write_json

ROOT = Path(__file__).resolve().parents[1]
CLI = [sys.executable, "-m", "resnet_fused.cli"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
OP_TESTS = ("test_*ops.py", "test_conv_*.py", "test_triton_bn.py", "test_experimental*.py")
CALL_AGAIN = 4  # the exit status of a tune that a crash stopped
ATTEMPTS = 5
DONE = ("ok", "failed")  # a step that ran to its end; anything else runs again at the next call


@dataclasses.dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: also of its entry in `state.json`.
        command: given the seconds it may take.
        limit_s: it is ended after so long.
        least_s: it is not begun with less.
        headline: the last line of its output that matches is shown in the summary.
    """

    name: str
    command: Callable[[int], list[str]]
    limit_s: int
    least_s: int
    headline: str


def steps(out: Path, rehearse: bool) -> list[Step]:
    """In order of value."""
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    tests = sorted(str(path.relative_to(ROOT)) for pattern in OP_TESTS for path in (ROOT / "tests").glob(pattern))
    passed, right, wrote = r"\d+ (passed|failed)", r"checks against float64|error:", r"^predicted|^\d+ problems|error:"
    means = r"geometric mean|error:"
    if rehearse:
        tiny = ["--model", "resnet18", "--image-size", "32", "--batch", "2", "--dtype", "fp32", "--rounds", "1"]
        return [
            Step("check", lambda s: [*PYTEST, "tests/test_ops.py", "-k", "refusals"], 120, 1, passed),
            Step(
                "verify",
                lambda s: [
                    *CLI,
                    "verify",
                    "--rehearse",
                    "--mode",
                    "infer",
                    "--dtype",
                    "fp32",
                    "--json",
                    f"{out}/verify.json",
                ],
                120,
                1,
                right,
            ),
            Step("tune", lambda s: [*CLI, "tune", "--rehearse", "--budget", "3s"], 120, 1, wrote),
            Step("ops", lambda s: [*PYTEST, "benchmarks", "-k", "add_act and eager"], 120, 1, passed),
            Step(
                "infer",
                lambda s: [
                    *CLI,
                    "bench",
                    *tiny,
                    "--mode",
                    "infer",
                    "--contestants",
                    "fused",
                    "--json",
                    f"{out}/infer.json",
                ],
                120,
                1,
                means,
            ),
            Step(
                "train",
                lambda s: [
                    *CLI,
                    "bench",
                    *tiny,
                    "--mode",
                    "train",
                    "--contestants",
                    "fused",
                    "--json",
                    f"{out}/train.json",
                ],
                120,
                1,
                means,
            ),
        ]
    workers = str(min(8, os.cpu_count() or 1))
    bench = [*CLI, "bench", "--model", "resnet50", "--dtype", "bf16"]
    found = (
        []
        if _library.device_type() == "cuda"
        else [Step("build", lambda s: build, 240, 30, r"cuda sm_|not built|error")]
    )
    return found + [
        Step("check", lambda s: [*PYTEST, "-n", workers, *tests], 150, 20, passed),
        Step("gpu tests", lambda s: [*PYTEST, "-m", "gpu", "tests"], 120, 30, passed),
        Step(
            "verify",
            lambda s: [*CLI, "verify", "--model", "resnet50", "--dtype", "bf16", "--json", f"{out}/verify.json"],
            120,
            20,
            right,
        ),
        Step(
            "tune", lambda s: [*CLI, "tune", "--model", "resnet50", "--budget", f"{max(10, s - 20)}s"], 300, 40, wrote
        ),
        Step(
            "train",
            lambda s: [*bench, "--mode", "train", "--batch", "256", "--budget", str(s), "--json", f"{out}/train.json"],
            240,
            60,
            means,
        ),
        Step(
            "infer",
            lambda s: [
                *bench,
                "--mode",
                "infer",
                "--batch",
                "256,1",
                "--budget",
                str(s),
                "--json",
                f"{out}/infer.json",
            ],
            240,
            60,
            means,
        ),
        Step(
            "train on triton",
            lambda s: [
                *bench,
                *("--mode", "train", "--batch", "256", "--contestants", "fused", "--backend", "triton"),
                *("--budget", str(s), "--json", f"{out}/train_triton.json"),
            ],
            150,
            45,
            means,
        ),
        Step("ops", lambda s: [*PYTEST, "benchmarks", f"--benchmark-json={out}/ops.json"], 240, 45, passed),
    ]


def run(step: Step, seconds: int, log: Path, environment: dict[str, str]) -> tuple[str, str]:
    """Run a step, its output going to the log as it comes.

    Returns:
        its status ("ok", "failed", "stopped", "out of time") and its headline.
    """
    command = step.command(seconds)
    with log.open("ab") as sink:
        sink.write(f"\n===== {step.name}: {' '.join(command)}\n".encode())
        sink.flush()
        begin = sink.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = {0: "ok", CALL_AGAIN: "stopped"}.get(process.wait(seconds), "failed")
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    with log.open("rb") as source:
        source.seek(begin)
        lines = source.read().decode(errors="replace").splitlines()
    matching = [line.strip() for line in lines if re.search(step.headline, line)]
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return status, (matching or [last])[-1][:160]


def summary(state: dict[str, dict[str, object]], todo: list[Step]) -> str:
    """A table of what ran and what is left."""
    rows = [("step", "status", "s", "in a line")]
    for step in todo:
        entry = state.get(step.name)
        rows.append(
            (step.name, str(entry["status"]), f"{entry['seconds']:.0f}", str(entry["headline"]))
            if entry
            else (step.name, "left", "", "run the command again")
        )
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    )


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 all ran and passed, 1 something failed, 3 something is left for the next call, 2 bad usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="end within this time (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/gpu"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--rehearse", action="store_true", help="every step, tiny, on a CPU")
    parser.add_argument("--again", action="store_true", help="run also what has run already")
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g} is not a time > 0")
    if not (options.rehearse or torch.cuda.is_available()):
        parser.error("no CUDA GPU here; --rehearse runs every step on the CPU")
    deadline = time.monotonic() + 60 * options.minutes
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "PYTHONUNBUFFERED": "1",
        "RESNET_FUSED_CACHE": str(out / "cache"),
    }
    if options.rehearse:
        environment["TRITON_INTERPRET"] = "1"
    else:  # no time for the other architectures
        environment.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    record = out / "state.json"
    state = json.loads(record.read_text()) if record.exists() and not options.again else {}
    todo = steps(out, options.rehearse)
    for step in todo:
        status = state.get(step.name, {}).get("status")
        attempts = 0
        while status not in DONE and attempts < ATTEMPTS and deadline - time.monotonic() >= step.least_s:
            seconds = min(step.limit_s, int(deadline - time.monotonic()))
            print(f"{step.name}: at most {seconds} s", flush=True)
            start = time.monotonic()
            status, headline = run(step, seconds, out / "log.txt", environment)
            state[step.name] = {"status": status, "seconds": time.monotonic() - start, "headline": headline}
            write_json(state, record)
            print(f"  {status}: {headline}", flush=True)
            attempts += 1 if status == "stopped" else ATTEMPTS
    text = summary(state, todo)
    write_atomically(out / "summary.txt", lambda temporary: temporary.write_text(text + "\n"))
    print(f"\n{text}\nresults in {out}")
    statuses = [state.get(step.name, {}).get("status") for step in todo]
    return 1 if "failed" in statuses else 0 if set(statuses) == {"ok"} else 3


if __name__ == "__main__":
    sys.exit(main())
