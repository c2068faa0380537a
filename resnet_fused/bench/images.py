"""Real pictures through plain and fused models: do they still say the same?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypedDict, final

import torch

from resnet_fused._command import UsageError, one_line
from resnet_fused.bench.correctness import top1_agreement

RESIZE, CROP = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Compared(TypedDict):
    contestant: str
    dtype: str


class Agreement(TypedDict):
    """Top-1 agreement (0 to 1), the largest absolute logit difference, and that over the largest plain logit."""

    top1_agreement: float
    max_logit_difference: float
    relative_difference: float


@final
class Agrees(_Compared, Agreement):
    """How far a contestant agrees with the baseline."""


@final
class Unknown(_Compared):
    """Why that is not known."""

    problem: str


class Pictures(TypedDict):
    """Contestants on real pictures."""

    source: str
    count: int
    comparisons: list[Agrees | Unknown]


def load_folder(folder: Path) -> torch.Tensor:
    """Every file of `folder`, sorted by name, as [N, 3, 224, 224] fp32; subfolders and hidden files are passed over.

    Raises:
        UsageError: there is no such folder, it holds no file, or a file in it is no readable picture.
    """
    if not folder.is_dir():
        raise UsageError(f"--images {folder}: not a folder")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not files:
        raise UsageError(f"--images {folder}: no picture in this folder itself")
    return torch.stack([_load(path) for path in files])


def load_samples() -> torch.Tensor | None:
    """The two photographs that ship with scikit-learn, as `load_folder` returns them; None without scikit-learn."""
    try:
        from PIL import Image
        from sklearn.datasets import load_sample_images
    except ImportError:
        return None
    return torch.stack([_preprocess(Image.fromarray(image)) for image in load_sample_images().images])


def _load(path: Path) -> torch.Tensor:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return _preprocess(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, DecompressionBombError, struct.error, ...
        raise UsageError(f"--images: cannot read {path} as a picture: {one_line(error)}") from None


def _preprocess(image: object) -> torch.Tensor:
    """Shorter side to 256, centre crop 224, ImageNet's mean and standard deviation: the usual evaluation."""
    from torchvision.transforms import v2

    steps = [
        v2.ToImage(),
        v2.Resize(RESIZE, antialias=True),
        v2.CenterCrop(CROP),
        v2.ToDtype(torch.float32, scale=True),
    ]
    return v2.Compose([*steps, v2.Normalize(MEAN, STD)])(image)


def logits_of(forward: Callable[[torch.Tensor], torch.Tensor], pictures: torch.Tensor, batch: int) -> torch.Tensor:
    """Logits of all pictures, in batches of exactly `batch` (the last one filled up by repeating its last picture)."""
    rows = []
    for chunk in pictures.split(batch):
        missing = batch - len(chunk)
        full = torch.cat([chunk, chunk[-1:].expand(missing, -1, -1, -1)]) if missing else chunk
        rows.append(forward(full)[: len(chunk)].float().cpu())
    return torch.cat(rows)


def compare(logits: torch.Tensor, plain: torch.Tensor) -> Agreement:
    """A contestant's logits and the baseline's."""
    difference = float((logits - plain).abs().max())
    return {
        "top1_agreement": top1_agreement(logits, plain),
        "max_logit_difference": difference,
        "relative_difference": difference / float(plain.abs().max()),
    }
