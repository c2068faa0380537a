"""What ran, by name: on a GPU its kernels, on a CPU the ops, with their time in a step."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch.profiler import ProfilerActivity, profile

SHOWN, WIDTH = 15, 90


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Attributes:
    name: as the profiler has it.
    calls: a step.
    ms: of all its calls in a step.
    """

    name: str
    calls: float
    ms: float


def kernels(events: Iterable[Any], on_gpu: bool, steps: int) -> tuple[Kernel, ...]:
    """The profiler's events by name, the longest first; on a GPU what ran there, on a CPU each op without its callees.

    Args:
        events: of torch.profiler.
        on_gpu: which of the two.
        steps: they were recorded in.
    """
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    calls: dict[str, int] = defaultdict(int)
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        # A mark of the profiler's user covers kernels, and is none.
        if event.device_type != device or getattr(event, "is_user_annotation", False):
            continue
        if not on_gpu and "::" not in event.name:
            continue  # a mark, or what autograd does around the ops
        calls[event.name] += 1
        spent[event.name] += (event.time_range.end - event.time_range.start) if on_gpu else event.self_cpu_time_total
    found = [Kernel(name, calls[name] / steps, spent[name] / 1e3 / steps) for name in calls if spent[name] > 0]
    return tuple(sorted(found, key=lambda kernel: -kernel.ms))


def measure(step: Callable[[], object], device: torch.device, steps: int) -> tuple[Kernel, ...]:
    """The kernels of a call, which has been warmed up."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize(device)
    return kernels(profiler.events(), on_gpu, steps)


def table(title: str, found: tuple[Kernel, ...]) -> Table:
    """The longest of them, each with its share of all."""
    total = sum(kernel.ms for kernel in found)
    shown = Table(title=title, title_justify="left", title_style="bold")
    for name in ("ms", "share", "calls", "ms a call"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("kernel", no_wrap=True)
    for kernel in found[:SHOWN]:
        numbers = (
            f"{kernel.ms:.3f}",
            f"{kernel.ms / total:.1%}",
            f"{kernel.calls:g}",
            f"{kernel.ms / kernel.calls:.4f}",
        )
        shown.add_row(*numbers, Text(kernel.name if len(kernel.name) <= WIDTH else f"{kernel.name[: WIDTH - 3]}..."))
    rest = found[SHOWN:]
    if rest:
        ms = sum(kernel.ms for kernel in rest)
        calls = sum(kernel.calls for kernel in rest)
        shown.add_row(f"{ms:.3f}", f"{ms / total:.1%}", f"{calls:g}", "", Text(f"{len(rest)} others"))
    return shown
