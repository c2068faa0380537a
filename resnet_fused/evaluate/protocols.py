"""The ways in which the paper scores a picture, as functions of a model and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from resnet_fused.evaluate.dense import classify_windows

SHORTER_SIDE, CROP = 256, 224
SCALES = (224, 256, 384, 480, 640)  # He et al., section 4.1
Average = Literal["softmax", "logits"]


def single_crop(model: nn.Module, images: Tensor, crop: int = CROP) -> Tensor:
    """softmax(model(the centre)), `[N, classes]` fp32.

    Args:
        model: in eval mode.
        images: `[N, C, H, W]`, normalised, usually with a shorter side of 256; both sides at least `crop`.
        crop: side of the square that the model sees.

    Raises:
        ValueError: a picture smaller than the crop.
    """
    from torchvision.transforms.v2 import functional

    _check_crop("single_crop", images, crop)
    return _probabilities(model(functional.center_crop(images, [crop, crop])))


def ten_crop(model: nn.Module, images: Tensor, crop: int = CROP) -> Tensor:
    """The mean of softmax(model(.)) over the four corners, the centre, and their mirror images, `[N, classes]` fp32.

    Args:
        model: in eval mode.
        images: `[N, C, H, W]`, normalised, usually with a shorter side of 256; both sides at least `crop`.
        crop: side of the squares that the model sees.

    Raises:
        ValueError: a picture smaller than the crop.

    Source: Krizhevsky, Sutskever, Hinton, 2012, as in He et al., 2015, table 3.
    """
    from torchvision.transforms.v2 import functional

    _check_crop("ten_crop", images, crop)
    crops = torch.stack(functional.ten_crop(images, [crop, crop]), 1)
    return _probabilities(model(crops.flatten(0, 1))).unflatten(0, (len(images), 10)).mean(1)


def multi_scale(
    model: nn.Module,
    images: Tensor,
    scales: Sequence[int] = SCALES,
    *,
    window: int = 7,
    average: Average = "softmax",
    flip: bool = False,
    pool: str | None = None,
) -> Tensor:
    """Scores of the fully convolutional network, averaged over all positions, then over scales, `[N, classes]` fp32.

    Args:
        model: in eval mode; with one adaptive pool before its classifier (see `classify_windows`).
        images: `[N, C, H, W]`, normalised, at their own size: they are resized here.
        scales: shorter sides.
        window: side of the classifier's window on the last activations, 7 in the paper.
        average: what is averaged: probabilities, or logits of which the softmax is taken at the end. The paper says
            "scores".
        flip: average over the mirrored pictures, too.
        pool: name of the pool before the classifier, where the model has several.

    Raises:
        ValueError: no scales, an unknown `average`, a scale too small for the window, no single pool.

    Source: He et al., 2015, section 4.1, table 4.
    """
    if not scales or average not in ("softmax", "logits"):
        raise ValueError(
            f"multi_scale: scales {tuple(scales)!r} must name one or more sides, average {average!r} must be "
            "'softmax' or 'logits'"
        )
    per_scale = [dense_scores(model, at_scale(images, scale), window, average, flip, pool) for scale in scales]
    return finish(torch.stack(per_scale).mean(0), average)


def dense_scores(
    model: nn.Module, images: Tensor, window: int, average: Average, flip: bool, pool: str | None
) -> Tensor:
    """What `multi_scale` averages over scales: the scores of one scale, averaged over positions, `[N, classes]`."""
    versions = [images, images.flip(-1)] if flip else [images]
    scores = [classify_windows(model, version, window, pool).float() for version in versions]
    if average == "softmax":
        scores = [one.softmax(-1) for one in scores]
    return torch.stack(scores).mean((0, 2, 3))


def finish(scores: Tensor, average: Average) -> Tensor:
    """Averaged scores as probabilities."""
    return scores.softmax(-1) if average == "logits" else scores


def at_scale(images: Tensor, shorter_side: int) -> Tensor:
    """Pictures `[..., C, H, W]` resized so that their shorter side is as given: bilinear, antialiased."""
    from torchvision.transforms.v2 import functional

    return functional.resize(images, [shorter_side], antialias=True)


def ensemble(probabilities: Sequence[Tensor]) -> Tensor:
    """The mean of what several models say, `[N, classes]`.

    Args:
        probabilities: of each model, `[N, classes]`.

    Raises:
        ValueError: no model, or models that differ in pictures or classes.
    """
    shapes = sorted({tuple(one.shape) for one in probabilities})
    if len(shapes) != 1:
        raise ValueError(f"ensemble: the models' scores must have one shape, got {shapes or 'no model'}")
    return torch.stack(list(probabilities)).mean(0)


def _probabilities(logits: Tensor) -> Tensor:
    return logits.float().softmax(-1)


def _check_crop(function: str, images: Tensor, crop: int) -> None:
    if images.dim() != 4 or not 1 <= crop <= min(images.shape[-2:]):
        raise ValueError(
            f"{function}: images {list(images.shape)} must be [N, C, H, W] with H, W >= the crop of {crop} >= 1"
        )
