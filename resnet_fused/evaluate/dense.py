"""A classifier applied at every position of a larger picture: the fully convolutional form of a network."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def find_pool(model: nn.Module) -> str:
    """The name of the pool between the convolutions and the classifier.

    Torchvision and this package call it `avgpool` (an `nn.AdaptiveAvgPool2d`), timm `global_pool`
    (a `SelectAdaptivePool2d`).

    Raises:
        ValueError: the model has none, or several.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and (isinstance(module, nn.AdaptiveAvgPool2d) or kind == "SelectAdaptivePool2d"):
            found.append(name)
    if len(found) != 1:
        listed = ", ".join(found) or "none"
        raise ValueError(
            f"{type(model).__name__} must have one adaptive pool, its adaptive pools are: {listed}; "
            "name the one before the classifier with pool=..."
        )
    return found[0]


def classify_windows(model: nn.Module, x: Tensor, window: int = 7, pool: str | None = None) -> Tensor:
    """Logits of the classifier at every position of a `window` x `window` square sliding over the last activations.

    The same as cutting the picture's activations into all squares of the size the classifier was trained on, at stride
    1, and classifying each: not the average over the whole picture that an adaptive pool makes of a larger input.

    Args:
        model: with one adaptive pool between its convolutions and a classifier that treats pictures one by one.
        x: pictures, `[N, C, H, W]`.
        window: side of the activations in training: 7 for 224 x 224 pictures and networks that divide by 32.
        pool: the name of that pool; by default the only adaptive pool of the model.

    Returns:
        `[N, h - window + 1, w - window + 1, classes]` where the last activations are `[N, *, h, w]`.

    Raises:
        ValueError: a window below 1; no or several pools; a pool of that name is not called exactly once; activations
            smaller than the window.

    Source: He et al., 2015, section 4.1; Sermanet et al., "OverFeat", 2014.
    """
    if window < 1:
        raise ValueError(f"classify_windows: a window of {window} x {window}; at least 1 x 1")
    modules = dict(model.named_modules())
    name = find_pool(model) if pool is None else pool
    if name not in modules:
        raise ValueError(f"classify_windows: {type(model).__name__} has no module {name!r}")
    positions: list[tuple[int, int]] = []

    def slide(module: nn.Module, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        (features,) = inputs
        height, width = features.shape[-2] - window + 1, features.shape[-1] - window + 1
        if min(height, width) < 1:
            raise ValueError(
                f"classify_windows: a picture of {x.shape[-2]} x {x.shape[-1]} pixels has activations of "
                f"{features.shape[-2]} x {features.shape[-1]}, smaller than the window of {window} x {window}"
            )
        positions.append((height, width))
        return module.forward(_squares(module, features, window))

    handle = modules[name].register_forward_hook(slide)
    try:
        logits = model(x)
    finally:
        handle.remove()
    if len(positions) != 1:
        raise ValueError(f"classify_windows: the pool {name!r} was called {len(positions)} times, not once")
    return logits.view(len(x), *positions[0], -1)


def _squares(module: nn.Module, features: Tensor, window: int) -> Tensor:
    """Every square as a picture of its own, `[N * h * w, C, window, window]`; averaged already where that is all the
    pool does: `[N * h * w, C, 1, 1]`."""
    channels = features.shape[1]
    if _averages(module):
        averages = F.avg_pool2d(features, window, stride=1)
        return averages.permute(0, 2, 3, 1).reshape(-1, channels, 1, 1)
    squares = features.unfold(2, window, 1).unfold(3, window, 1)
    return squares.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels, window, window)


def _averages(module: nn.Module) -> bool:
    """Whether the pool is the mean over all positions and nothing else."""
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return module.output_size in (1, (1, 1))
    return getattr(module, "pool_type", None) in ("avg", "fast", "fastavg")
