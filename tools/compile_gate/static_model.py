"""What a training step of our Triton kernels would take by their machine code: a prediction, and nothing was measured.

    python -m tools.compile_gate.triton_gate --model resnet50 --step 256 [--arch 90]

The step runs on meta tensors: its ops are noted, then their launches, and each distinct kernel is compiled. A launch
takes the longest of four times, as if the others hid behind it, and the launch itself:

    bytes    of its tensors, each read or written once, at a copy's bandwidth
    matrix   its products, at the rate that a large one reaches
    issue    instructions of all programs (the main loop as often as its products ask, all else once), four a cycle
    latency  of programs that follow one another on a multiprocessor: two memory latencies each, and one every
             num_stages - 1 steps of the main loop; more blocks a multiprocessor, fewer programs in a row

Not known: conflicts, misses of caches, clocks, how often loops without products run. What PyTorch runs of the step, the
stem's convolution and the head, is the cost model's, at its roof.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count

import resnet_fused
from resnet_fused.bench import cost
from resnet_fused.dispatch.conv import MULTIPROCESSORS
from resnet_fused.dispatch.device import assume_gpu
from resnet_fused.measure import models
from resnet_fused.measure.cases import Case
from resnet_fused.measure.network import build, describe
from resnet_fused.ops import OPS
from resnet_fused.tuning.launches import SHARED_MEMORY_KB
from tools.compile_gate.machine_code import FLOP_PER_CYCLE, SCHEDULERS, MachineCode

# A copy's bytes and a large product's bf16 FLOP a second: of an A100 (40 GB) and an H100 SXM as others measured them.
RATES = {80: (1.3e12, 250e12), 90: (3.0e12, 790e12)}
LATENCY = 800  # cycles to memory, under load; a guess
LAUNCH = 2e-6  # seconds from the end of one kernel to the work of the next, in a CUDA graph; a guess
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # of a multiprocessor


@dataclass(frozen=True)
class Launch:
    """One launch of a step: `count` times the same kernel on tensors of the same sizes."""

    family: str
    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    grid: int
    bytes: int
    flop: float
    count: int


@dataclass(frozen=True)
class Times:
    """Seconds, each as if there were nothing else."""

    bytes: float = 0.0
    matrix: float = 0.0
    issue: float = 0.0
    latency: float = 0.0

    @property
    def longest(self) -> float:
        return max(self.bytes, self.matrix, self.issue, self.latency)


class _Calls(TorchDispatchMode):
    """Notes the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "resnet_fused":
            self.found.append((func._opname, args))
        return func(*args, **(kwargs or {}))


class _Launches:
    """In the place of who watches a launcher: notes what it would launch."""

    def __init__(self) -> None:
        self.found: list[tuple[Any, int, tuple[Any, ...], dict[str, Any]]] = []

    def launch(self, kernel: Any, grid: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.found.append((kernel, grid, args, options))

    def give_up(self) -> None:
        pass


def launches(model: str, batch: int, arch: int, size: int = 224) -> list[Launch]:
    """What a training step in bf16 launches on our Triton kernels, on a GPU of `arch` without a table."""
    from resnet_fused import kernels
    from resnet_fused.kernels import _replay

    found: list[Launch] = []
    with assume_gpu(arch), resnet_fused.use_backend("triton"), _Calls() as calls:
        network = models.create(model, 0).to("meta", torch.bfloat16, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        x = torch.empty(batch, 3, size, size, dtype=torch.bfloat16, device="meta")
        resnet_fused.fuse(network)(x.contiguous(memory_format=torch.channels_last)).sum().backward()
    alike: dict[str, list[tuple[str, tuple[Any, ...]]]] = {}
    for name, args in calls.found:
        alike.setdefault(str((name, *map(_described, args))), []).append((name, args))
    with assume_gpu(arch):
        for calls_alike in alike.values():
            (name, args), count = calls_alike[0], len(calls_alike)
            op = OPS[name]
            with mock.patch.object(_replay._watching, "by", _Launches(), create=True):
                results = kernels.run(op.name, op.args(*args))
                noted: list[tuple[Any, int, tuple[Any, ...], dict[str, Any]]] = _replay._watching.by.found
            flop = op.flops(op.args(*args), op.results(results), conv_flop_count) if op.flops else 0
            products = max(1, sum("R" in options for *_, options in noted))
            found += [_launch(*one, flop=flop / products, count=count) for one in noted]
    return found


def _described(argument: Any) -> Any:
    return (argument.shape, argument.stride(), argument.dtype) if isinstance(argument, Tensor) else argument


def _launch(kernel: Any, grid: int, args: tuple[Any, ...], options: dict[str, Any], flop: float, count: int) -> Launch:
    name, convolves = kernel.fn.__name__.strip("_").removesuffix("_kernel"), "R" in options
    tensors = {id(t): t.nbytes for t in args if isinstance(t, Tensor)}
    family = f"{name} {options['R']}x{options['S']}" if convolves else name
    return Launch(family, kernel, args, options, grid, sum(tensors.values()), flop if convolves else 0.0, count)


def times(launch: Launch, code: MachineCode, shared: int, arch: int) -> Times:
    """Of one launch, by its kernel's machine code."""
    bandwidth, flop_per_s = RATES[arch]
    multiprocessors, warps = MULTIPROCESSORS[arch], launch.options.get("num_warps", 4)
    cycle = multiprocessors * FLOP_PER_CYCLE[arch] / flop_per_s  # seconds, at the clock that such a product leaves
    registers = math.ceil(max(code.registers, 1) / 8) * 8 * 32 * warps
    fitting = (
        BLOCKS,
        THREADS // (32 * warps),
        REGISTERS // registers,
        SHARED_MEMORY_KB[arch] * 1024 // (shared + 1024),
    )
    rounds = math.ceil(launch.grid / (max(1, min(fitting)) * multiprocessors))
    steps = launch.flop / (launch.grid * code.loop_flop) if code.loop_flop else 0.0
    issued = code.instructions - code.loop + steps * code.loop
    ahead = max(1, launch.options.get("num_stages", 3) - 1)
    return Times(
        launch.bytes / bandwidth,
        launch.flop / flop_per_s,
        launch.grid / multiprocessors * issued * warps / SCHEDULERS * cycle,
        rounds * (2 + steps / ahead) * LATENCY * cycle,
    )


def step(model: str, batch: int, arch: int, processes: int) -> Iterator[tuple[str, int, float, Times]]:
    """(family, launches, seconds that they take, what these are the longest of) of a step, and what PyTorch runs."""
    from tools.compile_gate import triton_gate as gate

    found = launches(model, batch, arch)
    compiled = [
        gate.job("", gate.Expect(), arch, one.kernel, one.kernel.fn.__name__, one.arguments, one.options)
        for one in found
    ]
    distinct = {str(job): job for job in compiled}
    with ProcessPoolExecutor(processes) as pool:
        reports = dict(zip(distinct, pool.map(gate.compile_job, distinct.values()), strict=True))
    families: dict[str, list[tuple[Launch, Times]]] = {}
    for one, job in zip(found, compiled, strict=True):
        report = reports[str(job)]
        if not report.code.instructions:
            raise RuntimeError(f"{one.family}: {'; '.join(report.problems)}")
        families.setdefault(one.family, []).append((one, times(one, report.code, report.shared, arch)))
    for family, ones in sorted(families.items()):
        parts = Times(*(sum(one.count * getattr(t, f.name) for one, t in ones) for f in fields(Times)))
        taken = sum(one.count * (t.longest + LAUNCH) for one, t in ones)
        yield family, sum(one.count for one, _ in ones), taken, parts
    plain = build(model)
    rest = [
        one
        for one in cost.costs(plain, describe(plain), Case(model, "train", batch, "bf16", "meta"))["planned"]
        if one.where == "head" or (one.where == "stem" and one.op.startswith("conv"))
    ]
    moved, flop = cost.total(rest)
    yield "PyTorch's", len(rest), cost.seconds(rest, *RATES[arch]), Times(moved / RATES[arch][0], flop / RATES[arch][1])


def table(rows: list[tuple[str, int, float, Times]], batch: int) -> str:
    """The rows and their sum, in milliseconds, as Markdown."""
    total = sum(seconds for _, _, seconds, _ in rows)
    whole = Times(*(sum(getattr(parts, f.name) for *_, parts in rows) for f in fields(Times)))
    lines = ["| kernel | launches | bytes | matrix | issue | latency | predicted ms |", "|---|--:|--:|--:|--:|--:|--:|"]
    for name, count, seconds, parts in [*rows, ("step", sum(row[1] for row in rows), total, whole)]:
        cells = (f"{1e3 * value:.2f}" for value in (parts.bytes, parts.matrix, parts.issue, parts.latency, seconds))
        lines.append(f"| {name} | {count} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"Predicted, not measured: {batch / total:,.0f} images/s."])
