"""The activations that may end a unit, one entry each: ReLU anywhere, the others fused in inference only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Activation:
    """An activation in PyTorch's terms.

    Attributes:
        name: what the ops call it, and the Triton function that computes it.
        function: of a tensor and `inplace`.
        module: the class that computes the same.
        functions, methods: the other spellings in a traced graph.
        onednn: its name in oneDNN's fused convolutions.
    """

    name: str
    function: Callable[..., Tensor]
    module: type[nn.Module]
    functions: tuple[Callable[..., Any], ...]
    methods: tuple[str, ...]
    onednn: str


ACTIVATIONS = {
    found.name: found
    for found in (
        Activation("relu", F.relu, nn.ReLU, (F.relu_, torch.relu, torch.relu_), ("relu", "relu_"), "relu"),
        Activation("silu", F.silu, nn.SiLU, (), (), "swish"),
        Activation("hardswish", F.hardswish, nn.Hardswish, (), (), "hardswish"),
    )
}


def activate(y: Tensor, act: str | None, inplace: bool = False) -> Tensor:
    """The activation of that name, or `y`."""
    return y if act is None else ACTIVATIONS[act].function(y, inplace=inplace)
