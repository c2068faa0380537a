"""What a bench run measures: validated choices, and one clear line for each that is not one."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch

Mode = Literal["infer", "train"]
Dtype = Literal["fp32", "bf16", "fp16"]
Asked = tuple[Mode, int, Dtype]  # of a model: the mode, the batch, the dtype
MODES: tuple[Mode, ...] = get_args(Mode)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Unavailable(RuntimeError):
    """A contestant cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One row group of the table: what every contestant runs, with the same weights and the same input."""

    model: str
    mode: Mode
    batch: int
    dtype: Dtype
    device: str
    image_size: int = 224

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def label(self) -> str:
        return f"{self.mode}, batch {self.batch}, {self.dtype}"
