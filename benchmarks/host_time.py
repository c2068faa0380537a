"""Host time of ResNet-50, without a GPU: what Python, the dispatcher and the launches of a step or a call cost.

    python -m benchmarks.host_time [--rounds 15] [--json FILE] [--breakdown]

The network has ResNet-50's layers on few channels and small images, so that a CPU computes next to nothing: eager and
`fuse` without a table run on it as they are. The Triton kernels go to a dry device (tests/support/dry_device): Triton's
own driver and launchers, and nothing executes. All contestants take turns; a figure is the median of the rounds' thread
time, under autocast to bfloat16. Kernels are counted by the driver's stand-in, dispatches by the profiler.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import cProfile
import pstats
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

import resnet_fused
from resnet_fused.bench.results import write_json

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))

# On Triton at most: kernels launched in a training step, which CI counts, and its host time by eager's.
MOST_LAUNCHES, MOST_HOST_TIME = 330, 1.3
ARCH = 90
WARM_UP = 4


@dataclass
class HostTime:
    """Of one contestant: milliseconds of a training step's halves and of an inference call, and what they launch.

    Attributes:
        dispatches: operators that a training step takes through PyTorch's dispatcher.
        launches: Triton kernels of a training step; None where they are PyTorch's.
    """

    forward: float
    backward: float
    inference: float
    dispatches: int
    launches: int | None

    @property
    def step(self) -> float:
        return self.forward + self.backward


class ResNet50(nn.Module):
    """torchvision's, but for its channels."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        blocks: list[nn.Module] = []
        inputs = channels
        for stage, count in enumerate((3, 4, 6, 3)):
            planes = channels << stage
            for i in range(count):
                stride = 2 if stage and i == 0 else 1
                projection = nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False)
                downsample = nn.Sequential(projection, nn.BatchNorm2d(4 * planes)) if i == 0 else None
                blocks.append(Bottleneck(inputs, planes, stride, downsample))
                inputs = 4 * planes
        self.blocks = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        y: Tensor = self.fc(torch.flatten(self.avgpool(self.blocks(x)), 1))
        return y


class Contestant:
    """A network and the backend it is forced to; None where the plan decides."""

    def __init__(self, model: nn.Module, backend: str | None, batch: int, size: int) -> None:
        self.training, self.inference = model, copy.deepcopy(model).eval()
        self.backend = backend
        self.x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        self.target = torch.randint(0, 10, (batch,))

    def _context(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.backend is None else resnet_fused.use_backend(self.backend)

    def step(self) -> tuple[float, float]:
        """Seconds of a training step's forward, with the loss, and of its backward."""
        for p in self.training.parameters():
            p.grad = None
        with self._context():
            started = time.thread_time()
            with torch.autocast("cpu", torch.bfloat16):
                y = self.training(self.x)
            loss = F.cross_entropy(y.float(), self.target)
            forward = time.thread_time()
            loss.backward()
            return forward - started, time.thread_time() - forward

    def call(self) -> float:
        """Seconds of an inference call."""
        with self._context(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            started = time.thread_time()
            self.inference(self.x)
            return time.thread_time() - started


def contestants(batch: int, size: int) -> dict[str, Contestant]:
    torch.manual_seed(0)
    model = ResNet50().to(memory_format=torch.channels_last).train()
    fused = resnet_fused.fuse(copy.deepcopy(model))
    return {
        "eager": Contestant(model, None, batch, size),
        "fused, no table": Contestant(copy.deepcopy(fused), None, batch, size),
        "fused Triton": Contestant(fused, "triton", batch, size),
    }


def measure(found: dict[str, Contestant], rounds: int, launches: Callable[[], int]) -> dict[str, HostTime]:
    """Times of all contestants, who take turns."""
    for contestant in found.values():
        for _ in range(WARM_UP):
            contestant.step()
            contestant.call()
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, contestant in found.items():
            times[name].append((*contestant.step(), contestant.call()))
    measured = {}
    for name, contestant in found.items():
        before = launches()
        dispatches = _dispatches(contestant.step)
        triton = launches() - before if contestant.backend == "triton" else None
        forward, backward, inference = (1e3 * statistics.median(column) for column in zip(*times[name], strict=True))
        measured[name] = HostTime(forward, backward, inference, dispatches, triton)
    return measured


def _dispatches(run: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    own = ("aten::", "mkldnn::", "resnet_fused")
    return sum(event.count for event in profile.key_averages() if event.key.startswith(own))


def table(measured: dict[str, HostTime]) -> Table:
    """Milliseconds, and each contestant's share of eager's."""
    eager = measured["eager"]
    floor = f"at most {MOST_HOST_TIME} of eager's step, {MOST_LAUNCHES} launches"
    shown = Table(title="Host time of ResNet-50, ms (of eager's)", caption=f"on Triton {floor}")
    for column in ("", "forward", "backward", "training step", "inference", "dispatches", "Triton launches"):
        shown.add_column(column, justify="right" if column else "left")
    for name, one in measured.items():
        pairs = ((getattr(one, what), getattr(eager, what)) for what in ("forward", "backward", "step", "inference"))
        launches = "-" if one.launches is None else str(one.launches)
        cells = [f"{ms:.1f} ({ms / reference:.2f})" for ms, reference in pairs]
        shown.add_row(name, *cells, str(one.dispatches), launches)
    return shown


def breakdown(contestant: Contestant, steps: int = 5) -> Table:
    """Where a training step's time goes, by package; the profiler slows Python, so shares alone mean anything."""
    profile = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):
        profile.enable()
        for _ in range(steps):
            contestant.step()
        profile.disable()
    times: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for (file, _, function), (_, count, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        layer = _layer(file, function)
        times[layer] += own
        calls[layer] += count
    shown = Table(title="Where a step's host time goes")
    for column in ("", "share", "calls a step"):
        shown.add_column(column, justify="right" if column else "left")
    for layer, seconds in times.most_common(16):
        shown.add_row(layer, f"{seconds / times.total():.1%}", f"{calls[layer] / steps:.0f}")
    return shown


def _layer(file: str, function: str) -> str:
    parts = Path(file).parts
    for package, depth in (("resnet_fused", 2), ("triton", 2), ("torch", 2)):
        if package in parts[:-1]:
            at = len(parts) - 1 - parts[::-1].index(package)
            return "/".join(parts[at : at + depth])
    return f"built in: {function}" if file == "~" else parts[-1]


@contextlib.contextmanager
def _dry_device() -> Iterator[Callable[[], int]]:
    from dry_device import dry_device

    with dry_device(ARCH) as stand_in:
        yield stand_in.dry_launches


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=15, metavar="N", help="steps and calls of each contestant (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=2, metavar="N", help="images (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, default=64, metavar="PIXELS", help="side of the square images (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument(
        "--breakdown", action="store_true", help="also: which package takes how much of a fused training step on Triton"
    )
    chosen = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with _dry_device() as launches:
        found = contestants(chosen.batch, chosen.size)
        measured = measure(found, chosen.rounds, launches)
        console = Console(width=120)
        console.print(table(measured))
        if chosen.breakdown:
            console.print(breakdown(found["fused Triton"]))
    if chosen.json is not None:
        write_json({name: asdict(one) for name, one in measured.items()}, chosen.json)


if __name__ == "__main__":
    main()
