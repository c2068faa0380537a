"""Timing: every contestant once per round, the order changing from round to round, percentiles last.

Interleaving spreads what drifts - clocks, temperature, other users of the machine - evenly over the contestants.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from resnet_fused._command import one_line

Call = Callable[[], object]
Clock = Callable[[Call], float]

MIN_ROUNDS, MAX_ROUNDS = 5, 200
# ONNX Runtime's threads spin for 50 ms behind a call, and slow whoever follows up to twice.
REST_S = 0.06
L2_FLUSH_BYTES = 256 * 2**20  # larger than the L2 of any supported GPU


@dataclasses.dataclass(frozen=True)
class Timing:
    """The samples of one contestant, in milliseconds per call, in the order in which they were taken."""

    samples_ms: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.samples_ms, percent))

    @property
    def p20(self) -> float:
        return self.percentile(20)

    @property
    def p50(self) -> float:
        return self.percentile(50)

    @property
    def p80(self) -> float:
        return self.percentile(80)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Timings by contestant, and the reason for each contestant that raised while it was timed."""

    timings: dict[str, Timing]
    failures: dict[str, str]
    rounds: int


def round_order(names: Sequence[str], round_index: int) -> list[str]:
    """The order of one round: rotated by one place per round, reversed in every other cycle.

    Over two cycles every contestant stands in every place equally often and follows both of its neighbours.
    """
    count = len(names)
    cycle, shift = divmod(round_index, count)
    base = list(names) if cycle % 2 == 0 else list(reversed(names))
    return base[shift:] + base[:shift]


def cpu_clock(call: Call) -> float:
    """Wall-clock milliseconds of one call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def clock_for(device: torch.device) -> Clock:
    """The one clock of everything that is timed: milliseconds of a call on a cold L2, wall-clock time on a CPU.

    On a GPU the call is queued behind the flush, as triton.testing.do_bench does: what runs as a CUDA graph, or far
    enough ahead of the GPU, does not wait for its launch. A call that launches more slowly than the GPU computes does.
    """
    if device.type != "cuda":
        return cpu_clock
    scratch = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(call: Call) -> float:
        torch.cuda.synchronize(device)
        scratch.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))

    return clock


def time_interleaved(
    calls: Mapping[str, Call],
    clock: Clock,
    *,
    rounds: int | None = None,
    budget_s: float = 10.0,
    warmup: int = 2,
    rest_s: float = 0.0,
    on_round: Callable[[int], None] = lambda done: None,
) -> Measured:
    """Time `calls` side by side.

    Args:
        calls: what to time, by name.
        clock: runs a call and returns its milliseconds.
        rounds: how many rounds; None: as many as fit into `budget_s`, between MIN_ROUNDS and MAX_ROUNDS.
        budget_s: seconds for the timed rounds; ignored when `rounds` is given.
        warmup: untimed rounds before.
        rest_s: seconds before each timed call, in which the threads of the one before go to sleep.
        on_round: called after each timed round with the number of rounds done.

    Returns:
        The timings. A call that raises leaves the race; its reason is in `failures`, and it has no timing.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    failures: dict[str, str] = {}

    def run_round(index: int, keep: bool) -> None:
        for name in round_order(list(samples), index):
            if keep and rest_s > 0:
                time.sleep(rest_s)
            try:
                elapsed = clock(calls[name])
            except Exception as error:  # one contestant running out of memory must not end the race
                failures[name] = one_line(error, kind=True)
                continue
            if keep:
                samples[name].append(elapsed)
        for name in failures:
            samples.pop(name, None)

    for index in range(warmup):
        if samples:
            run_round(index, keep=False)
    done = 0
    start = time.perf_counter()
    while samples and done < (rounds or MAX_ROUNDS):
        if rounds is None and done >= MIN_ROUNDS:
            elapsed = time.perf_counter() - start
            if elapsed * (done + 1) / done > budget_s:
                break
        run_round(done, keep=True)
        done += 1
        on_round(done)
    timings = {name: Timing(tuple(values)) for name, values in samples.items()}
    return Measured(timings, failures, done)
