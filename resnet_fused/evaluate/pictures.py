"""Pictures from a folder or a torchvision dataset; those that cannot be read are told, not dropped in silence."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fused._command import UsageError, choose, one_line


@dataclass(frozen=True)
class Picture:
    """One picture as a protocol sees it: its views, `[..., 3, h, w]` in [0, 1], and its class."""

    views: tuple[Tensor, ...]
    target: int


@dataclass(frozen=True)
class Unreadable:
    """A picture that could not be decoded."""

    name: str
    reason: str


Batch = list[Picture | Unreadable]


class Pictures(torch.utils.data.Dataset):
    """The pictures of `source`, decoded and cut into views; an unreadable one is an item that says so.

    Args:
        source: items are (PIL picture, class); `samples`, where it has them, are (path, class).
        views: from a picture, uint8 `[3, H, W]`, to what the model is to see of it.
        indices: which items of `source`.
    """

    def __init__(self, source: Any, views: Callable[[Tensor], tuple[Tensor, ...]], indices: Sequence[int]) -> None:
        self.source, self.views, self.indices = source, views, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, k: int) -> Picture | Unreadable:
        from torchvision.transforms.v2 import functional

        index = self.indices[k]
        try:
            picture, target = self.source[index]
            pixels = functional.pil_to_tensor(picture.convert("RGB"))
        except Exception as error:  # of PIL's decoders: OSError, SyntaxError, ValueError, struct.error...
            samples = getattr(self.source, "samples", None)
            name = str(samples[index][0]) if samples else f"picture {index}"
            return Unreadable(name, one_line(error, kind=True))
        return Picture(self.views(pixels), int(target))


def as_list(items: Batch) -> Batch:
    """A DataLoader's batch, left as a list: pictures differ in size."""
    return items


def spread(total: int, limit: int | None) -> list[int]:
    """At most `limit` of `total` indices, evenly spread: folders are sorted by class."""
    if limit is None or limit >= total:
        return list(range(total))
    return [i * total // limit for i in range(limit)]


def open_data(text: str) -> Any:
    """The dataset that a command line names, with PIL pictures.

    Args:
        text: a folder with one subfolder for each class, in the alphabetical order of the model's classes; or
            `torchvision:<class>[:<root>]`, its test or validation split, which must be there already.

    Raises:
        UsageError: there is no such folder or dataset, or no picture in it.
    """
    if text.startswith("torchvision:"):
        return _torchvision(text)
    return open_folder("--data", Path(text), ", or torchvision:<dataset>:<root>")


def open_folder(option: str, folder: Path, instead: str = "") -> Any:
    """The pictures of a folder with a subfolder per class; raises UsageError, which names the option and `instead`."""
    from torchvision.datasets import ImageFolder

    takes = f"it takes a folder with a subfolder per class{instead}"
    if not folder.is_dir():
        raise UsageError(f"{option} {folder}: not a folder; {takes}")
    try:
        if not any(entry.is_dir() for entry in folder.iterdir()):
            raise UsageError(f"{option} {folder}: no folder of pictures in it; {takes}")
        return ImageFolder(str(folder))
    except OSError as error:
        what = one_line(error).partition(". ")[0].rstrip(".")  # what follows lists every kind of file
        raise UsageError(f"{option} {folder}: {what}; give every class a subfolder with its pictures") from None


def _torchvision(text: str) -> Any:
    from torchvision import datasets

    name, _, root = text.removeprefix("torchvision:").partition(":")
    choose(name, datasets.__all__, "torchvision dataset")
    cls = getattr(datasets, name)
    takes = inspect.signature(cls).parameters
    options: dict[str, Any] = {"root": os.path.expanduser(root) or "data"} if "root" in takes else {}
    if "train" in takes:
        options["train"] = False
    errors = []
    for split in ("val", "test") if "split" in takes else (None,):
        try:
            return cls(**options, **({"split": split} if split else {}))
        except Exception as error:  # whatever it says of missing files and unknown splits
            errors.append(one_line(error))
    raise UsageError(f"--data {text}: {errors[0]}")
