"""Evaluate models on pictures: every protocol for every model, and for all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from resnet_fused._command import UsageError, one_line
from resnet_fused.evaluate import protocols
from resnet_fused.evaluate.error_rate import ErrorRate, ranks
from resnet_fused.evaluate.pictures import Picture, Pictures, Unreadable, as_list, spread

PROTOCOLS = ("single", "ten-crop", "multi-scale")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """How pictures are seen, and by what they are scored.

    Attributes:
        shorter_side, crop: of `single` and `ten-crop`.
        scales, window, average, flip: of `multi-scale`; without a window, each model's own at `crop`.
        batch, workers, limit: pictures at a time, processes that decode them, pictures at most.
        device, dtype: where the models run; fp16 and bf16 through autocast.
    """

    shorter_side: int = protocols.SHORTER_SIDE
    crop: int = protocols.CROP
    scales: tuple[int, ...] = protocols.SCALES
    window: int | None = None
    average: protocols.Average = "softmax"
    flip: bool = False
    batch: int = 32
    workers: int = 0
    limit: int | None = None
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Row:
    """The errors of one model, or of the ensemble, under one protocol; or why there are none."""

    model: str
    protocol: str
    errors: dict[int, ErrorRate]
    problem: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Everything found; `unreadable` are left out of every row. Interrupted: by Ctrl-C, after these rows."""

    rows: tuple[Row, ...]
    unreadable: tuple[Unreadable, ...]
    pictures: int
    interrupted: bool = False


@dataclass(frozen=True)
class _Views:
    """From a picture, uint8 `[3, H, W]`, to what a protocol shows its model; picklable, for worker processes."""

    protocol: str
    settings: Settings

    def __call__(self, picture: Tensor) -> tuple[Tensor, ...]:
        from torchvision.transforms.v2 import functional

        s = self.settings
        size = [s.crop, s.crop]
        sides = s.scales if self.protocol == "multi-scale" else (s.shorter_side,)
        views = [protocols.at_scale(picture, side) for side in sides]
        if self.protocol == "single":
            views = [functional.center_crop(views[0], size)]
        elif self.protocol == "ten-crop":
            views = [torch.stack(functional.ten_crop(views[0], size))]
        return tuple(functional.to_dtype(view, torch.float32, scale=True) for view in views)


def evaluate(
    models: Sequence[tuple[str, nn.Module]],
    source: Any,
    chosen: Sequence[str],
    settings: Settings,
    progress: Progress = lambda *_: None,
) -> Evaluation:
    """Top-1 and top-5 error of each model, and of all together if there are several, under each protocol.

    Args:
        models: (name, model that takes pictures in [0, 1] and is in eval mode on `settings.device`).
        source: a dataset of (PIL picture, class).
        chosen: of `PROTOCOLS`.
        settings: see there.
        progress: called with (protocol, pictures done, pictures).

    A model that fails under a protocol has the reason in its row.

    Raises:
        UsageError: no picture could be read, or no model could be evaluated under any protocol.
    """
    rows: list[Row] = []
    unreadable: dict[str, Unreadable] = {}  # by name: every protocol meets them again
    indices = spread(len(source), settings.limit)
    if not indices:
        raise UsageError("--data: no picture in it")
    interrupted = False
    try:
        for protocol in chosen:
            rows += _protocol(protocol, models, source, indices, settings, unreadable, progress)
    except KeyboardInterrupt:
        if not rows:
            raise
        interrupted = True
    if all(row.problem for row in rows):
        raise UsageError(str(rows[0].problem))
    read = max((error.total for row in rows for error in row.errors.values()), default=len(indices) - len(unreadable))
    return Evaluation(tuple(rows), tuple(unreadable.values()), read, interrupted)


def _protocol(
    protocol: str,
    models: Sequence[tuple[str, nn.Module]],
    source: Any,
    indices: list[int],
    settings: Settings,
    unreadable: dict[str, Unreadable],
    progress: Progress,
) -> list[Row]:
    """The rows of one protocol; `unreadable` grows."""
    scorers = [_Scorer(protocol, name, model, settings) for name, model in models]
    together = _Together(f"ensemble of {len(models)}", protocol)
    done = read = 0
    data = Pictures(source, _Views(protocol, settings), indices)
    for items in DataLoader(data, settings.batch, num_workers=settings.workers, collate_fn=as_list):
        unreadable.update((item.name, item) for item in items if isinstance(item, Unreadable))
        for group in _same_shapes(items):
            targets = torch.tensor([picture.target for picture in group])
            read += len(group)
            scores = [one.score(group, targets) for one in scorers]
            if len(models) > 1:
                together.add(scores, targets)
        done += len(items)
        progress(protocol, done, len(indices))
    if not read:
        first = next(iter(unreadable.values()))
        raise UsageError(f"none of the {len(indices)} pictures can be read; the first: {first.reason}")
    rows = [one.row() for one in scorers]
    if len(models) > 1:
        together.problem = next((f"{one.name}: {one.problem}" for one in scorers if one.problem), together.problem)
        rows.append(together.row())
    return rows


class _Ranked:
    """The places of the right classes under one protocol, or why there are none."""

    def __init__(self, name: str, protocol: str) -> None:
        self.name, self.protocol = name, protocol
        self.places: list[Tensor] = []
        self.classes = 0
        self.problem: str | None = None

    def note(self, scores: Tensor, targets: Tensor) -> None:
        """Probabilities `[N, classes]` and the right classes `[N]` of some pictures."""
        self.classes = scores.shape[1]
        if int(targets.max()) >= self.classes:
            raise UsageError(f"{self.name} has {self.classes} classes, but a picture is of class {targets.max()}")
        self.places.append(ranks(scores.cpu(), targets))

    def row(self) -> Row:
        if self.problem is not None:
            return Row(self.name, self.protocol, {}, self.problem)
        found = torch.cat(self.places)
        ks = [k for k in (1, 5) if k < self.classes]
        return Row(self.name, self.protocol, {k: ErrorRate(int((found >= k).sum()), len(found)) for k in ks})


class _Scorer(_Ranked):
    """One model; what it raises is its problem, and leaves the others theirs."""

    def __init__(self, protocol: str, name: str, model: nn.Module, settings: Settings) -> None:
        super().__init__(name, protocol)
        self.model, self.settings, self.window = model, settings, settings.window

    def score(self, group: Sequence[Picture], targets: Tensor) -> Tensor | None:
        """Probabilities `[N, classes]`; None once it has failed."""
        if self.problem is not None:
            return None
        try:
            if self.window is None and self.protocol == "multi-scale":
                self.window = trained_window(self.model, self.settings.crop, self.settings.device)
            scores = _score(self.protocol, self.model, group, self.settings, self.window or 0)
            self.note(scores, targets)
            return scores
        except Exception as error:
            self.problem = one_line(error)
            return None


class _Together(_Ranked):
    """All models."""

    def add(self, scores: Sequence[Tensor | None], targets: Tensor) -> None:
        try:
            every = [one for one in scores if one is not None]
            if self.problem is None and len(every) == len(scores):
                self.note(protocols.ensemble(every), targets)
        except Exception as error:
            self.problem = one_line(error)


def _same_shapes(items: Sequence[Picture | Unreadable]) -> Iterator[list[Picture]]:
    """The readable pictures, those of equal size together."""
    groups: dict[tuple[torch.Size, ...], list[Picture]] = {}
    for item in items:
        if isinstance(item, Picture):
            groups.setdefault(tuple(view.shape for view in item.views), []).append(item)
    yield from groups.values()


@torch.inference_mode()
def _score(protocol: str, model: nn.Module, pictures: Sequence[Picture], settings: Settings, window: int) -> Tensor:
    """Probabilities `[N, classes]`."""
    s = settings
    views = [torch.stack(same).to(s.device) for same in zip(*(p.views for p in pictures), strict=True)]
    half = s.dtype != torch.float32
    with torch.autocast(s.device.type, s.dtype) if half else nullcontext():
        if protocol == "multi-scale":
            views = [view.to(memory_format=torch.channels_last) for view in views]
            per_scale = [protocols.dense_scores(model, view, window, s.average, s.flip, None) for view in views]
            return protocols.finish(torch.stack(per_scale).mean(0), s.average)
        (view,) = views
        many = view.flatten(0, 1) if protocol == "ten-crop" else view
        probabilities = model(many.to(memory_format=torch.channels_last)).float().softmax(-1)
        return probabilities.unflatten(0, (len(view), -1)).mean(1)


@torch.inference_mode()
def trained_window(model: nn.Module, crop: int, device: torch.device) -> int:
    """Side of the last activations of a picture of the size the model was trained on: 7 for ImageNet's networks."""
    from resnet_fused.evaluate.dense import find_pool

    sides: list[int] = []
    pool = model.get_submodule(find_pool(model))
    handle = pool.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
    try:
        model(torch.zeros(1, 3, crop, crop, device=device))
    finally:
        handle.remove()
    return sides[0]
