"""Evaluate models on pictures: every protocol for every model, and for all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from resnet_fused._command import UsageError
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
    """The errors of one model, or of the ensemble, under one protocol."""

    model: str
    protocol: str
    errors: dict[int, ErrorRate]


@dataclass(frozen=True)
class Evaluation:
    """Everything found; `unreadable` are left out of every row."""

    rows: tuple[Row, ...]
    unreadable: tuple[Unreadable, ...]
    pictures: int


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

    Raises:
        UsageError: no picture could be read, or one of a class that a model does not have.
    """
    rows: list[Row] = []
    unreadable: dict[str, Unreadable] = {}  # by name: every protocol meets them again
    indices = spread(len(source), settings.limit)
    if not indices:
        raise UsageError("--data: no picture in it")
    read = 0
    windows = [settings.window or 0] * len(models)
    if settings.window is None and "multi-scale" in chosen:
        windows = [trained_window(model, settings.crop, settings.device) for _, model in models]
    for protocol in chosen:
        places: list[list[Tensor]] = [[] for _ in range(len(models) + (len(models) > 1))]
        classes, done = 0, 0
        data = Pictures(source, _Views(protocol, settings), indices)
        loader = DataLoader(data, settings.batch, num_workers=settings.workers, collate_fn=as_list)
        for items in loader:
            unreadable.update((item.name, item) for item in items if isinstance(item, Unreadable))
            for group in _same_shapes(items):
                scores = [_score(protocol, m, group, settings, w) for (_, m), w in zip(models, windows, strict=True)]
                targets = torch.tensor([picture.target for picture in group])
                classes = scores[0].shape[1]
                _check_classes([name for name, _ in models], scores, targets)
                if len(models) > 1:
                    scores.append(protocols.ensemble(scores))
                for collected, one in zip(places, scores, strict=True):
                    collected.append(ranks(one.cpu(), targets))
            done += len(items)
            progress(protocol, done, len(indices))
        if not places[0]:
            first = next(iter(unreadable.values()))
            raise UsageError(f"none of the {len(indices)} pictures can be read; the first: {first.reason}")
        names = [name for name, _ in models] + [f"ensemble of {len(models)}"]
        for name, collected in zip(names, places, strict=False):
            found = torch.cat(collected)
            read = len(found)
            ks = [k for k in (1, 5) if k < classes]
            rows.append(Row(name, protocol, {k: ErrorRate(int((found >= k).sum()), read) for k in ks}))
    return Evaluation(tuple(rows), tuple(unreadable.values()), read)


def _check_classes(names: Sequence[str], scores: Sequence[Tensor], targets: Tensor) -> None:
    for name, one in zip(names, scores, strict=True):
        if int(targets.max()) >= one.shape[1]:
            raise UsageError(f"{name} has {one.shape[1]} classes, but a picture is of class {targets.max()}")


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
