"""Where a step spends its time: every block and every convolution of a network, against the machine's measured roofs.

Times come from torch.profiler: on a CPU the time in each op, on a GPU that of its kernels (gaps between kernels, which
a CUDA graph closes, are not in them). An op of the backward belongs to the layer whose forward made its autograd node.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from resnet_fused._command import one_line
from resnet_fused.bench import cost, kernel_times
from resnet_fused.bench.contestants import CONTESTANTS
from resnet_fused.bench.cost import HEAD, STEM
from resnet_fused.bench.kernel_times import STEP, Kernel
from resnet_fused.bench.runner import Runner
from resnet_fused.measure import memory, roof
from resnet_fused.measure.cases import Case
from resnet_fused.measure.network import Network
from resnet_fused.measure.timing import clock_for

STEPS, WARM_UP = 3, 2
SCOPE = "layer: "
BACKWARD = "autograd::engine::evaluate_function: "
OPTIMIZER, OTHER = "optimizer", "other"
REPLACED = ("frozen", "frozen-int8")  # their modules are not the model's: only their kernels can be told
# What an op is, by its name; the outermost op that is something decides, so that a copy inside a convolution is one.
KINDS = (
    ("convolution", r"conv"),
    ("batch norm", r"batch_norm|::bn_|merge_statistics"),
    ("ReLU and add", r"relu|threshold_backward|::add(_|$)"),
    ("pool", r"pool|::mean"),
    ("linear and loss", r"linear|addmm|::mm|log_softmax|nll_loss|cross_entropy"),
    ("copies", r"::copy_|::_to_copy|::clone|::contiguous|::zero_|::fill_"),
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Milliseconds a step of one kind of work in one place.

    Attributes:
        where: a residual block by its name, "stem", "head" (with the loss), "optimizer" or "other".
        layer: the convolution, where it runs as a module of its own.
        kind: one of `KINDS`, "optimizer" or "other" (Python, autograd, allocation).
        backward: whether autograd ran it.
    """

    where: str
    layer: str | None
    kind: str
    backward: bool
    ms: float


@dataclasses.dataclass(frozen=True)
class Profiled:
    """One contestant on one case.

    Attributes:
        contestant: its name.
        step_ms: the median of steps without the profiler.
        pieces: the profile; it adds up to more than `step_ms` by what profiling costs.
        scheme: of the cost model, what it is held against.
        kernels: what ran, by name, the longest first.
    """

    contestant: str
    step_ms: float
    pieces: tuple[Piece, ...]
    scheme: str
    kernels: tuple[Kernel, ...] = ()

    @property
    def total_ms(self) -> float:
        return sum(piece.ms for piece in self.pieces)

    def ms(self, where: str, layer: str | None = None) -> float | None:
        """Of a place, or of one convolution in it; None where it is not seen alone."""
        found = [p.ms for p in self.pieces if p.where == where and (layer is None or p.layer == layer)]
        return sum(found) if found else None


@dataclasses.dataclass(frozen=True)
class CaseProfile:
    """The contestants on one case, and what the machine can do.

    Attributes:
        bandwidth: bytes per second of a copy, measured.
        flops_per_s: of the better of matrix product and convolution, measured in the case's dtype.
        costs: the ops of a step by scheme.
        contestants: whose modules are the model's.
        others: the rest, whose kernels alone are known.
        failures: (contestant, reason) of those that could not be profiled.
    """

    case: Case
    network: Network
    bandwidth: float
    flops_per_s: float
    costs: dict[str, list[cost.Cost]]
    contestants: tuple[Profiled, ...]
    others: tuple[Profiled, ...] = ()
    failures: tuple[tuple[str, str], ...] = ()

    def places(self) -> list[tuple[str, str | None]]:
        """(block, None), then (block, convolution) for each of its convolutions; in the order of the forward."""
        found: list[tuple[str, str | None]] = [(STEM, None)]
        for block in self.network.blocks:
            found.append((block.name, None))
            found += [(block.name, layer.name) for layer in block.layers]
        rest = dict.fromkeys(p.where for c in self.contestants for p in c.pieces)
        return found + [(place, None) for place in (HEAD, OPTIMIZER, OTHER) if place in rest]

    def ops(self, scheme: str, where: str, layer: str | None) -> list[cost.Cost]:
        """The ops of a place; of a convolution's module only the convolution itself."""
        found = [one for one in self.costs[scheme] if one.where == where]
        return found if layer is None else [o for o in found if o.layer == layer]

    def roof_ms(self, profiled: Profiled, where: str, layer: str | None = None) -> float | None:
        """The least time that the measured roofs allow for a place; None where the cost model knows nothing of it."""
        ops = self.ops(profiled.scheme, where, layer)
        return cost.seconds(ops, self.bandwidth, self.flops_per_s) * 1e3 if ops else None

    def fraction(self, profiled: Profiled, where: str, layer: str | None = None) -> float | None:
        """Of the roof: 1 is as fast as the machine allows. What stays in a CPU's cache may pass 1."""
        least, took = self.roof_ms(profiled, where, layer), profiled.ms(where, layer)
        return least / took if least and took else None

    def bytes_per_s(self, profiled: Profiled, where: str, layer: str | None = None) -> float | None:
        """What the cost model says that a place moves, over its time."""
        ops, took = self.ops(profiled.scheme, where, layer), profiled.ms(where, layer)
        return sum(op.bytes for op in ops) / took * 1e3 if ops and took else None

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "where": where,
                "layer": layer,
                "ms": profiled.ms(where, layer),
                "roof_fraction": self.fraction(profiled, where, layer),
                "contestant": profiled.contestant,
                "bytes": sum(op.bytes for op in self.ops(profiled.scheme, where, layer)),
                "bytes_per_s": self.bytes_per_s(profiled, where, layer),
                "flops": sum(op.flops for op in self.ops(profiled.scheme, where, layer)),
            }
            for profiled in self.contestants
            for where, layer in self.places()
        ]
        return {
            **dataclasses.asdict(self.case),
            "bandwidth_bytes_per_s": self.bandwidth,
            "roof_flops_per_s": self.flops_per_s,
            "contestants": [dataclasses.asdict(profiled) for profiled in (*self.contestants, *self.others)],
            "failures": dict(self.failures),
            "rows": rows,
        }


def measure(
    model: nn.Module, network: Network, case: Case, names: Iterable[str], bandwidth: float, flops_per_s: float
) -> CaseProfile:
    """Profile these contestants on a case, layer by layer; of those in `REPLACED` only the kernels."""
    costs = cost.costs(model, network, case)
    found: list[Profiled] = []
    failures: list[tuple[str, str]] = []
    for name in names:
        try:
            scheme = "planned" if name == "fused" and "planned" in costs else "eager"
            found.append(_profile(model, network, case, name, scheme))
        except Exception as error:  # whatever a contestant raises is its result
            failures.append((name, one_line(error, kind=True)))
    whole, others = (tuple(p for p in found if (p.contestant in REPLACED) == it) for it in (False, True))
    return CaseProfile(case, network, bandwidth, flops_per_s, costs, whole, others, tuple(failures))


def roofs(case: Case) -> tuple[float, float]:
    """The copy bandwidth and the matrix throughput of a case's device in its dtype, measured."""
    device = torch.device(case.device)
    return roof.copy_bandwidth(device), roof.measure(case.dtype, device).best


def _profile(model: nn.Module, network: Network, case: Case, name: str, scheme: str) -> Profiled:
    memory.require(4 * case.batch * 3 * case.image_size**2)
    if torch.device(case.device).type == "cpu":
        memory.require(case.batch * case.torch_dtype.itemsize * memory.activations(model, case.mode, case.image_size))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(case.batch, 3, case.image_size, case.image_size, generator=generator)
    labels = torch.randint(max(1, network.classes), (case.batch,), generator=generator)
    contestant, device = CONTESTANTS[name], torch.device(case.device)
    runner = Runner(contestant, model, case, pixels, labels)
    blocks = {block.name for block in network.blocks}
    # A fused block calls none of its convolutions, and one with hooks on it would not fuse them.
    alone = {layer.name for layer in network.layers} if contestant.plain else set()
    clock = clock_for(device)
    for _ in range(WARM_UP):
        runner.step_by_step()
    alone_ms = sorted(clock(runner.step_by_step) for _ in range(STEPS))[STEPS // 2]
    on_gpu, seen = device.type == "cuda", name not in REPLACED
    with _scopes(runner.module, blocks | alone if seen else set()):
        runner.step_by_step()
        profiler = kernel_times.record(runner.step_by_step, device, STEPS)
    pieces = attribute(profiler.events(), blocks, alone, on_gpu, STEPS) if seen else ()
    ran = kernel_times.kernels(profiler.key_averages(), on_gpu, STEPS)
    return Profiled(name, alone_ms, pieces, scheme, ran)


@contextlib.contextmanager
def _scopes(module: nn.Module, names: set[str]) -> Iterator[None]:
    """Put the forward of each of these modules between marks of the profiler."""
    handles = []
    for name, inner in module.named_modules():
        if name in names:
            marks: list[record_function] = []

            def begin(_: nn.Module, inputs: Any, name: str = name, marks: list[record_function] = marks) -> None:
                mark = record_function(SCOPE + name)
                mark.__enter__()
                marks.append(mark)

            def end(_: nn.Module, inputs: Any, output: Any, marks: list[record_function] = marks) -> None:
                marks.pop().__exit__(None, None, None)

            handles += [inner.register_forward_pre_hook(begin), inner.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attribute(events: Iterable[Any], blocks: set[str], alone: set[str], on_gpu: bool, steps: int) -> tuple[Piece, ...]:
    """The profiler's events as pieces: their own time without that of the ops they call, summed by place and kind."""
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    events.sort(key=lambda event: event.time_range.start)
    begun = list(_begun(events, blocks))
    forward: dict[int, tuple[str, str | None]] = {}
    lines = {id(event): list(_ancestors(event)) for event in events}

    def place(event: Any) -> tuple[str, str | None]:
        line = lines[id(event)]
        layer = next((name for one in line if (name := one.name.removeprefix(SCOPE)) in alone), None)
        if line[-1].name != STEP:
            return OTHER, layer
        return begun[bisect(begun, event.time_range.start, key=itemgetter(0)) - 1][1], layer

    sums: dict[tuple[str, str | None, str, bool], float] = defaultdict(float)
    for event in events:
        node = next((one for one in lines[id(event)] if one.name.startswith(BACKWARD)), None)
        if node is None and event.sequence_nr >= 0 and not event.name.startswith(SCOPE):
            forward[event.sequence_nr] = place(event)  # of ops with one number the last one made the node
    for event in events:
        line = lines[id(event)]
        if line[-1].name != STEP and not any(one.name.startswith(BACKWARD) for one in line):
            continue  # between the steps
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent <= 0:
            continue
        node = next((one for one in line if one.name.startswith(BACKWARD)), None)
        key: tuple[str, str | None, str, bool]
        if any(one.name.startswith("Optimizer.") for one in line):
            key = (OPTIMIZER, None, OPTIMIZER, False)
        elif node is not None:
            key = (*forward.get(node.sequence_nr, (OTHER, None)), _kind(line), True)
        else:
            key = (*place(event), _kind(line), False)
        sums[key] += spent / 1e3 / steps
    return tuple(Piece(*key, ms) for key, ms in sums.items())


def _ancestors(event: Any) -> Iterator[Any]:
    """The event, its caller, and so on."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _begun(events: Iterable[Any], blocks: set[str]) -> Iterator[tuple[float, str]]:
    """(when it begins, place) in the order of the forward; behind a block the head begins, if no other block does."""
    for event in events:
        if event.name == STEP:
            yield event.time_range.start, STEM
        elif (name := event.name.removeprefix(SCOPE)) in blocks:
            yield event.time_range.start, name
            yield event.time_range.end, HEAD


def _kind(line: list[Any]) -> str:
    found = OTHER
    for event in line:
        if event.name.startswith((SCOPE, STEP)):
            break
        if "::" in event.name and not event.name.startswith(BACKWARD):
            found = next((kind for kind, pattern in KINDS if re.search(pattern, event.name)), found)
    return found
