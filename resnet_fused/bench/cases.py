"""What a bench run measures: validated choices, and one clear line for each that is not one."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable

import torch

MODES = ("infer", "train")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class UsageError(ValueError):
    """A choice the command cannot honour; the message is one line that names the value and the choices."""


class Unavailable(RuntimeError):
    """A contestant cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row group of the table: what every contestant runs, with the same weights and the same input."""

    model: str
    mode: str
    batch: int
    dtype: str
    device: str
    image_size: int = 224

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def label(self) -> str:
        return f"{self.mode}, batch {self.batch}, {self.dtype}"


def choose(value: str, choices: Iterable[str], what: str) -> str:
    """Return `value` if it is one of `choices`.

    Raises:
        UsageError: it is not; the message names close choices, or all of them when there are few.
    """
    choices = list(choices)
    if value in choices:
        return value
    close = difflib.get_close_matches(value, choices, n=5, cutoff=0.5)
    if close and len(choices) > 8:
        hint = f"did you mean {', '.join(close)}?"
    else:
        hint = f"choices: {', '.join(choices[:20])}{', ...' if len(choices) > 20 else ''}"
    raise UsageError(f"unknown {what} {value!r}; {hint}")


def choose_many(text: str, choices: Iterable[str], what: str) -> tuple[str, ...]:
    """Split a comma list and check each item; duplicates are dropped, the order is kept."""
    choices = list(choices)
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise UsageError(f"no {what} given; choices: {', '.join(choices)}")
    return tuple(dict.fromkeys(choose(item, choices, what) for item in items))


def positive_integers(text: str, what: str) -> tuple[int, ...]:
    """Parse a comma list of integers > 0; duplicates are dropped, the order is kept."""
    try:
        values = [int(item) for item in text.split(",") if item.strip()]
    except ValueError:
        values = []
    if not values or min(values) < 1:
        raise UsageError(f"{what} {text!r} is not a comma list of integers > 0, like 1,8")
    return tuple(dict.fromkeys(values))


def seconds(text: str, what: str) -> float:
    """A duration > 0: `90`, `90s`, `5m`, `1h`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    value = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if value <= 0:
        raise UsageError(f"{what} {text!r} is not a duration > 0, like 90s or 5m")
    return value


def resolve_device(text: str | None) -> torch.device:
    """The device to measure on: `cpu`, `cuda` or `cuda:<index>`; by default the first GPU, or the CPU without one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text is None:
        text = "cuda" if count else "cpu"
    if text == "cpu":
        return torch.device("cpu")
    kind, _, index = text.partition(":")
    if kind != "cuda" or (":" in text and not index.isdigit()):
        raise UsageError(f"unknown device {text!r}; choices: cpu, cuda, cuda:<index>")
    if not count:
        raise UsageError(f"device {text!r}: torch {torch.__version__} finds no CUDA device here; choices: cpu")
    if index and int(index) >= count:
        raise UsageError(f"device {text!r}: there are {count} CUDA devices; choices: cpu, cuda:0 ... cuda:{count - 1}")
    return torch.device("cuda", int(index or 0))
