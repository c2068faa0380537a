"""What a bench run measures: validated choices, and one clear line for each that is not one."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch

from resnet_fused._command import (
    UsageError,
    choose,
    choose_many,
    positive_integer,
    positive_integers,
    resolve_device,
    seconds,
)

__all__ = [
    "DTYPES",
    "MODES",
    "Case",
    "Unavailable",
    "UsageError",
    "choose",
    "choose_many",
    "positive_integer",
    "positive_integers",
    "resolve_device",
    "seconds",
]
Mode = Literal["infer", "train"]
Dtype = Literal["fp32", "bf16", "fp16"]
MODES = get_args(Mode)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def reason_of(error: BaseException) -> str:
    """The first line that an error of another library says, or its type where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
