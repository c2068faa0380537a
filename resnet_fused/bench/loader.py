"""Loader-to-loss throughput: training on pictures that are read, decoded and augmented as it goes.

Three rates a contestant, in images per second: training on one batch that is there already (what the bench's table
shows), the input pipeline by itself, and both together: the number that a user gets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypedDict, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from resnet_fused._command import one_line
from resnet_fused.bench.images import MEAN, STD
from resnet_fused.bench.runner import Runner
from resnet_fused.measure.cases import Case
from resnet_fused.measure.timing import round_order

GENERATED, CLASSES, SIZE = 64, 4, (256, 320)  # pictures, folders, height and width: about ImageNet's after resizing
PREFETCH = 2
ROUNDS = 3
MAX_WORKERS = 16


class Rates(TypedDict):
    """Images per second: the median of the samples, and their percentiles."""

    images_per_s: float
    p20: float
    p80: float
    samples: list[float]


class _Trained(TypedDict):
    contestant: str
    case: str
    batch: int
    dtype: str


@final
class Trained(_Trained):
    """The three rates of a contestant on a case."""

    workers: int
    resident: Rates
    loader: Rates
    loader_to_loss: Rates


@final
class Untrained(_Trained):
    """Why there are none."""

    problem: str


Row = Trained | Untrained


@dataclasses.dataclass(frozen=True)
class Source:
    """Attributes:
    folder: of one folder a class, as torchvision's ImageFolder reads it; None: generated JPEGs.
    workers: processes that decode; by default one a core (at most 16), and none on a CPU, which they would take from.
    """

    folder: Path | None = None
    workers: int | None = None

    def processes(self, device: torch.device) -> int:
        if self.workers is not None:
            return self.workers
        return min(MAX_WORKERS, os.cpu_count() or 1) if device.type == "cuda" else 0


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Path]:
    """The folder of pictures, generated ones for as long as this lasts."""
    if source.folder is not None:
        yield source.folder
        return
    with tempfile.TemporaryDirectory(prefix="resnet_fused_pictures_") as name:
        generate(Path(name))
        yield Path(name)


def check(folder: Path) -> None:
    """Raises:
    UsageError: it is no folder of folders of pictures.
    """
    from resnet_fused.evaluate.pictures import open_folder

    open_folder("--loader", folder)


def generate(folder: Path, count: int = GENERATED) -> None:
    """Write JPEGs of smooth noise, about as long as photographs of their size, into `CLASSES` folders."""
    from PIL import Image

    random = np.random.default_rng(0)
    for index in range(count):
        home = folder / f"class{index % CLASSES}"
        home.mkdir(exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (SIZE[0] // 8, SIZE[1] // 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC), dtype=np.int16)
        picture = np.clip(smooth + random.integers(-8, 9, smooth.shape, dtype=np.int16), 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(home / f"{index:04d}.jpg", quality=90)


def batches(folder: Path, case: Case, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches as a training run makes them: random crop, flip, normalised; pinned for a GPU."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = [
        v2.RandomResizedCrop(case.image_size, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    data = ImageFolder(str(folder), v2.Compose(steps))
    # As many draws as batches will ever be asked for: an epoch that ends would empty the pipeline.
    endless = torch.utils.data.RandomSampler(data, replacement=True, num_samples=case.batch * 2**20)
    gpu = torch.device(case.device).type == "cuda"
    yield from DataLoader(
        data,
        case.batch,
        sampler=endless,
        num_workers=workers,
        pin_memory=gpu,
        prefetch_factor=PREFETCH if workers else None,
        drop_last=True,
    )


class PipelineError(RuntimeError):
    """The input pipeline has failed, whoever asked for the batch."""


def problem(case: Case, contestant: str, reason: str) -> Untrained:
    """The row of a contestant that could not be measured."""
    return {**_row(case, contestant), "problem": reason}


def _row(case: Case, contestant: str) -> _Trained:
    return {"contestant": contestant, "case": case.label, "batch": case.batch, "dtype": case.dtype}


def measure(
    case: Case,
    runners: Mapping[str, Callable[[], Runner]],
    folder: Path,
    workers: int,
    *,
    rounds: int = ROUNDS,
    steps: int = 8,
    on_round: Callable[[int], None] = lambda done: None,
) -> list[Row]:
    """The three rates of every contestant on a training case.

    Each round gives every contestant a window of training on loaded batches and one on its own batch, and the pipeline
    one by itself, in a changing order. Before each window of loaded batches as many are used up, untimed, as the
    pipeline holds ready, so that none lives on what was loaded while others were timed.

    Returns:
        A row a contestant: medians over the rounds of the images per second, with the samples; or its `problem`.

    Raises:
        PipelineError: no batch could be loaded.
    """
    device = torch.device(case.device)
    built: dict[str, Runner] = {}
    problems: dict[str, Untrained] = {}
    stream = batches(folder, case, workers)
    held = workers * PREFETCH

    @contextlib.contextmanager
    def alone_if_it_fails(name: str) -> Iterator[None]:
        try:
            yield
        except PipelineError:
            raise
        except Exception as error:  # whatever a contestant raises is its result
            built.pop(name, None)
            problems[name] = problem(case, name, one_line(error, kind=True))

    def rate(count: int, work: Callable[[], object]) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(count):
            work()
        _wait(device)
        return case.batch * count / (time.perf_counter() - start)

    def load() -> tuple[Tensor, Tensor]:
        try:
            return next(stream)
        except Exception as error:
            raise PipelineError(f"the input pipeline: {one_line(error, kind=True)}") from error

    def trained(runner: Runner) -> Callable[[], object]:
        def work() -> object:
            runner.feed(*load())
            return runner.step()

        return work

    alone: list[float] = []
    fed: dict[str, list[float]] = {name: [] for name in runners}
    resident: dict[str, list[float]] = {name: [] for name in runners}
    for name, build in runners.items():
        with alone_if_it_fails(name):
            runner = build()
            runner.warm_up()
            runner.step()
            built[name] = runner
    try:
        for index in range(rounds if built else 0):
            for name in round_order(list(built), index):
                with alone_if_it_fails(name):
                    resident[name].append(rate(steps, built[name].step))
                    work = trained(built[name])
                    for _ in range(held + 1):
                        work()
                    fed[name].append(rate(steps, work))
            for _ in range(held):
                load()
            alone.append(rate(steps, load))
            on_round(index + 1)
    finally:
        stream.close()  # type: ignore[attr-defined]
    return [
        problems.get(name)
        or {
            **_row(case, name),
            "workers": workers,
            "resident": _summary(resident[name]),
            "loader": _summary(alone),
            "loader_to_loss": _summary(fed[name]),
        }
        for name in runners
    ]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(rates: list[float]) -> Rates:
    p20, p50, p80 = (float(np.percentile(rates, percent)) for percent in (20, 50, 80))
    return {"images_per_s": p50, "p20": p20, "p80": p80, "samples": [round(rate, 4) for rate in rates]}


def lines(rows: Iterable[Row]) -> Iterator[str]:
    """A line a contestant."""
    for row in rows:
        if "problem" in row:
            yield f"loader to loss, {row['case']}, {row['contestant']}: {row['problem']}"
            continue
        resident, loader, both = row["resident"], row["loader"], row["loader_to_loss"]
        bound = "input pipeline" if loader["images_per_s"] < resident["images_per_s"] else "model"
        yield (
            f"loader to loss, {row['case']}, {row['contestant']}: {both['images_per_s']:.1f} images/s "
            f"({both['p20']:.1f} - {both['p80']:.1f}); on a resident batch {resident['images_per_s']:.1f}, the input "
            f"pipeline alone {loader['images_per_s']:.1f} ({row['workers']} worker processes): the {bound} bounds it"
        )
