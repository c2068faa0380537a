"""Everything that only a GPU can tell, in one command: build, check, verify, measure, tune, measure again.

    python -m benchmarks.gpu_run --minutes 9 --out out/gpu      again and again, until nothing is left
    python -m benchmarks.gpu_run --collect out/gpu              afterwards: results and plan table into the checkout

Steps run in order of value, each in a process of its own with a limit of time; a failed one stops no other. All that is
kept is a handful of files in one folder, written as it goes: state.json, summary.txt, log.txt, results.json (what every
step measured), profile.png, plan/<gpu>.json. Carried to another machine with a GPU of the same kind, the folder is all
that is needed to go on there. Nothing is fetched. What is recorded stays, also when the code has changed (its commit
stands beside it); `--again NAME` measures anew. Where the sources have come without git, RESNET_FUSED_COMMIT names
their commit. `--rehearse` runs every step, tiny, on a CPU: it shows that the command works, and tells nothing of a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_collect
from benchmarks.gpu_steps import ROOT, Step, steps
from resnet_fused._command import UsageError
from resnet_fused.bench.results import write_atomically, write_json
from resnet_fused.measure import provenance

TRIES = 3  # of a step that had all of its time and was not done
DONE = ("ok", "failed", "absent")
CUT_SHORT = "cut short"  # its call was over before its limit was: it goes on in its place
LOGGED = 100_000  # bytes of a step's output in log.txt: the beginning and the end
GRACE_S = 5  # of a step's time, to say what it has so far
SHOWN = 12  # last lines of a step that failed
TRACE = "Traceback (most recent call last):"
LEFT = r"left for the next call"
REHEARSAL = "rehearsal on a CPU"


@dataclasses.dataclass
class RunFolder:
    """The folder, and what is recorded in it.

    Attributes:
        out: the folder.
        gpu: whose results these are.
        rehearse: whether the steps are tiny.
        state: by the step's name: status, seconds, headline, commit, date, tries.
        results: by the step's name what it measured.
    """

    out: Path
    gpu: str
    rehearse: bool
    state: dict[str, dict[str, Any]]
    results: dict[str, Any]

    @classmethod
    def opened(cls, out: Path, gpu: str, rehearse: bool) -> RunFolder:
        """Raises:
        UsageError: the folder holds what another GPU has shown.
        """
        found = gpu_collect.read(out / "state.json", {"gpu": gpu, "steps": {}})
        if gpu and found["gpu"] != gpu:
            raise UsageError(f"{out} holds results of {found['gpu']}, this is {gpu}: name another --out")
        return cls(out, gpu, rehearse, found["steps"], gpu_collect.read(out / "results.json", {}))

    def write(self) -> None:
        order = {step.name: index for index, step in enumerate(steps())}
        self.state = dict(sorted(self.state.items(), key=lambda item: order.get(item[0], len(order))))
        write_json({"format": 1, "gpu": self.gpu, "steps": self.state}, self.out / "state.json")
        text = "\n".join(self.summary()) + "\n"
        write_atomically(self.out / "summary.txt", lambda temporary: temporary.write_text(text))

    def status(self, step: Step) -> str | None:
        status: str | None = self.state.get(step.name, {}).get("status")
        return status

    def todo(self, fresh: bool) -> list[Step]:
        """Steps to run: those not yet tried, or (not `fresh`) those tried and not done."""
        found = []
        for step in steps():
            entry = self.state.get(step.name, {})
            status = entry.get("status")
            if status in DONE or (status is not None and entry["tries"] >= TRIES):
                continue
            if (status in (None, CUT_SHORT)) == fresh:
                found.append(step)
        return found

    def run(self, step: Step, seconds: int) -> None:
        """Run a step and record what came of it."""
        absent = step.absent(self.rehearse)
        begin = time.monotonic()
        if absent:
            status, headline = "absent", absent
        else:
            print(f"{step.name}: at most {seconds} s", flush=True)
            status, headline = self._run(step, seconds)
        full = seconds >= step.limit_s
        if status in ("out of time", "unfinished") and not full:
            status = CUT_SHORT
        before = self.state.get(step.name, {})
        commit = _commit()
        self.state[step.name] = {
            "status": status,
            "seconds": round(time.monotonic() - begin, 1),
            "headline": headline,
            "commit": commit,
            "date_utc": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "tries": before.get("tries", 0) + (status != CUT_SHORT),
        }
        self.write()
        print(f"  {status}: {headline}", flush=True)

    def _run(self, step: Step, seconds: int) -> tuple[str, str]:
        with tempfile.TemporaryDirectory(prefix="gpu_run_") as folder:
            work = Path(folder)
            mine = work / f"{step.slug}.json"
            if step.name in self.results:  # some go on from what they have
                write_json(self.results[step.name], mine)
            status, lines = self._process(step, seconds, work)
            found = gpu_collect.read(mine, None)
            if found is not None:  # its command line names a folder that is gone
                self.results[step.name] = json.loads(json.dumps(found).replace(f"{work}/", ""))
                write_json(self.results, self.out / "results.json")
            for picture in work.glob("*.png"):
                shutil.copyfile(picture, self.out / picture.name)
        if status == "out of time" and TRACE in lines:  # of the interrupt, which says nothing
            lines = lines[: len(lines) - 1 - lines[::-1].index(TRACE)]
        lines = [line.replace(f"{work}/", "") for line in lines]
        matching = [line.strip() for line in lines if re.search(step.headline, line)]
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if status == "ok" and any(re.search(LEFT, line) for line in lines):
            status = "unfinished"
        if status not in ("ok", "unfinished"):
            print("\n".join(f"  | {line}" for line in lines[-SHOWN:]), flush=True)
        return status, (matching or [last])[-1][:200]

    def _process(self, step: Step, seconds: int, work: Path) -> tuple[str, list[str]]:
        """Its status and its output, which goes to the log as it comes."""
        command = step.command(seconds, work, self.rehearse)
        log = self.out / "log.txt"
        with log.open("ab") as sink:
            sink.write(f"\n===== {step.name}: {' '.join(command)}\n".encode())
            sink.flush()
            begin = sink.tell()
            status = _wait(command, {**self._environment(step, work), **step.environment}, sink, seconds)
        output = log.read_bytes()[begin:]
        if len(output) > LOGGED:
            kept = output[: LOGGED // 4] + b"\n[...]\n" + output[-3 * LOGGED // 4 :]
            with log.open("r+b") as sink:
                sink.truncate(begin)
                sink.seek(begin)
                sink.write(kept)
        return status, output.decode(errors="replace").splitlines()

    def _environment(self, step: Step, work: Path) -> dict[str, str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "PYTHONUNBUFFERED": "1",
            "RESNET_FUSED_CACHE": str(self.out / "plan" if step.uses_plan else work / "no plan"),
        }
        if self.rehearse:
            environment |= {"TRITON_INTERPRET": "1", "RESNET_FUSED_BUILD": "none"}
        else:  # no time for the other architectures
            environment.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
        return environment

    def summary(self) -> Iterator[str]:
        """A table of what ran and what is left, then what was measured."""
        rows = [("step", "status", "s", "in a line")]
        now = _commit() or ""
        for step in steps():
            entry = self.state.get(step.name)
            if entry is None:
                rows.append((step.name, "left", "", "run the command again"))
                continue
            at = entry["commit"] or ""
            other = f" (at {at})" if at.rstrip("+") != now.rstrip("+") else ""
            rows.append((step.name, entry["status"], f"{entry['seconds']:.0f}", f"{entry['headline']}{other}"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            yield "  ".join([*cells, row[3]]).rstrip()
        yield from gpu_collect.measured(self.results)


@functools.cache
def _commit() -> str | None:
    """Of the sources, with a + where they have been changed since."""
    found = provenance.commit()
    return f"{found['sha'][:10]}{'+' * found['dirty']}" if found else None


def _interruptible() -> None:
    """What a shell starts in the background ignores SIGINT, and hands that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(command: list[str], environment: dict[str, str], sink: Any, seconds: float) -> str:
    """Run a command in a process group of its own, which ends with it: "ok", "failed" or "out of time"."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=sink,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=_interruptible,
    )
    try:
        return "failed" if process.wait(max(1.0, seconds - GRACE_S)) else "ok"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest says what has failed so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        return "out of time"
    finally:
        with contextlib.suppress(ProcessLookupError):  # also what it has left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def plan(run: RunFolder, minutes: float) -> Iterator[str]:
    """What would run, and in which call at the latest."""
    call, spent = 1, 0.0
    yield f"{'step':<20}{'limit s':>8}  {'call':>4}  status"
    for step in steps():
        status = run.status(step) or "left"
        if status not in DONE or step.each_call:
            if spent and spent + step.least_s > 60 * minutes:
                call, spent = call + 1, 0.0
            spent += min(step.limit_s, 60 * minutes - spent)
        yield f"{step.name:<20}{step.limit_s:>8}  {'' if status in DONE else call:>4}  {status}"
        yield f"    {' '.join(step.command(step.limit_s, Path('WORK'), run.rehearse))}"
    yield f"at the latest in {call} calls of {minutes:g} minutes, where every step takes all of its time"


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 all ran and passed, 1 something failed, 3 something is left for the next call, 2 bad usage."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="end within this time (default: %(default)s)")
    add("--out", type=Path, default=Path("out/gpu"), help="folder of the results (default: %(default)s)")
    add("--rehearse", action="store_true", help="every step, tiny, on a CPU")
    add("--again", action="append", default=[], metavar="NAME", help="run this step also if it has run; all: every one")
    add("--plan", action="store_true", help="run nothing: the steps, their limits and command lines")
    add("--collect", type=Path, metavar="OUT", help="run nothing: put what OUT holds where the checkout keeps it")
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        parser.error(f"--minutes {options.minutes:g} is not a time > 0")
    unknown = set(options.again) - {step.name for step in steps()} - {"all"}
    if unknown:
        parser.error(f"--again {unknown.pop()!r}; choices: all, {', '.join(step.name for step in steps())}")
    try:
        if options.collect:
            print("\n".join(gpu_collect.collect(options.collect, ROOT)))
            return 0
        gpu = REHEARSAL if options.rehearse else torch.cuda.get_device_name() if torch.cuda.is_available() else None
        if gpu is None and not options.plan:
            parser.error("no CUDA GPU here; --rehearse runs every step on the CPU")
        run = RunFolder.opened(options.out.resolve(), gpu or "", options.rehearse)
    except UsageError as error:
        parser.error(str(error))
    if options.plan:
        print("\n".join(plan(run, options.minutes)))
        return 0
    return run_steps(run, time.monotonic() + 60 * options.minutes, options.again)


def run_steps(run: RunFolder, deadline: float, again: list[str]) -> int:
    """Run what is left until the deadline; the exit status."""
    run.out.mkdir(parents=True, exist_ok=True)
    for step in steps():
        if step.each_call or "all" in again or step.name in again:
            run.state.pop(step.name, None)
        if "all" in again or step.name in again:
            run.results.pop(step.name, None)
    for fresh in (True, False):
        for step in run.todo(fresh):
            left = int(deadline - time.monotonic())
            if left >= step.least_s:
                run.run(step, min(step.limit_s, left))
    run.write()
    print("", *run.summary(), f"results in {run.out}", sep="\n")
    statuses = {run.status(step) for step in steps()}
    return 1 if "failed" in statuses else 0 if statuses <= {"ok", "absent"} else 3


if __name__ == "__main__":
    sys.exit(main())
