"""What ran, by name: on a GPU its kernels, on a CPU the ops, with their time in a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

STEP = "one step"
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


def record(step: Callable[[], object], device: torch.device, steps: int) -> profile:
    """The profile of so many calls, each under the mark `STEP`; the call has been warmed up."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                step()
        if on_gpu:
            torch.cuda.synchronize(device)
    return profiler


def kernels(averages: Iterable[Any], on_gpu: bool, steps: int) -> tuple[Kernel, ...]:
    """What ran in a step, the longest first: on a GPU what ran there, on a CPU each op without its callees.

    Args:
        averages: `key_averages()` of a profile.
        on_gpu: which of the two.
        steps: that were recorded.
    """
    found = []
    for one in averages:
        # A mark covers kernels, and is none; what has no namespace is a mark too, or what autograd does around the ops.
        if on_gpu and one.device_type == DeviceType.CUDA and not one.is_user_annotation:
            found.append(Kernel(one.key, one.count / steps, one.self_device_time_total / 1e3 / steps))
        elif not on_gpu and one.device_type == DeviceType.CPU and "::" in one.key:
            found.append(Kernel(one.key, one.count / steps, one.self_cpu_time_total / 1e3 / steps))
    return tuple(sorted((kernel for kernel in found if kernel.ms > 0), key=lambda kernel: -kernel.ms))


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
