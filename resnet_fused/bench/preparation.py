"""What our kernels run by in a race: a table of measurements on this GPU, made first where that was asked for."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from resnet_fused._command import one_line
from resnet_fused.dispatch.choice import advice
from resnet_fused.dispatch.device import arch
from resnet_fused.measure.cases import Case
from resnet_fused.measure.progress import Silent


def prepare(model: str, cases: Iterable[Case], seconds: float, rehearse: bool, command: str, reporter: Any) -> str:
    """Check every kernel that these cases may run and time the right ones, into the table that the plan reads.

    Args:
        model: the name of the network.
        cases: of the race, all on one GPU.
        seconds: begin no problem after so many; what is left is for the next call.
        rehearse: every step on a CPU, on a tiny network, into a table that no plan reads.
        command: recorded as the origin of the table.
        reporter: gets `start(text)` once and `detail(text)` for each problem.

    Returns:
        A line about it. What goes wrong costs the table, not the race, and is in the line.
    """
    from resnet_fused.tuning import tune

    cases, start, found = list(cases), time.monotonic(), []
    for dtype in dict.fromkeys(case.dtype for case in cases):
        asked = [case for case in cases if case.dtype == dtype]
        reporter.start(f"checking our kernels against float64 and timing them in {dtype}, for at most {seconds:.0f} s")
        try:
            done = tune.tune(
                model,
                modes=tuple(dict.fromkeys(case.mode for case in asked)),
                batch={case.batch for case in asked},
                dtype=dtype,
                image_size=asked[0].image_size,
                budget_s=max(0.0, seconds - (time.monotonic() - start)),
                rehearse=rehearse,
                command=command,
                reporter=_Details(reporter),
            )
        except Exception as error:  # a model that cannot be described, a folder that cannot be written, a lost GPU
            found.append(f"{dtype} not tuned: {one_line(error, kind=True)}")
            continue
        wrong = f", {len(done.dropped)} not right and left out" if done.dropped else ""
        left = f", {done.left} left for the next call" if done.left else ""
        found.append(f"{dtype}: {done.measured} problems measured, {done.known} known already{wrong}{left}")
    if rehearse:
        found.append("a rehearsal on a CPU: no time here says anything")
    return f"our kernels were tuned in {time.monotonic() - start:.0f} s ({'; '.join(found)})"


def untuned(device: torch.device) -> str | None:
    """The line where nothing was tuned and no table speaks for the GPU."""
    return advice(arch(device)) if device.type == "cuda" else None


class _Details(Silent):
    """A reporter whose steps are details of another's one step."""

    def __init__(self, reporter: Any) -> None:
        self._reporter = reporter

    def start(self, text: str) -> None:
        self._reporter.detail(text)
