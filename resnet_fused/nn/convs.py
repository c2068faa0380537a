"""The convolutions that a fused call may stand in for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class RecognisedConv:
    """A convolution by what its forward computes, not by its class; `fusion.convs` looked into it.

    Attributes:
        module: has the parameters and the geometry of an `nn.Conv2d`. What its forward calls behind the convolution,
            such as a batch norm, is run apart.
    """

    module: nn.Conv2d

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, x: Tensor) -> Tensor:
        """The convolution alone."""
        conv = self.module
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


Conv = nn.Conv2d | RecognisedConv
CONVS = (nn.Conv2d, RecognisedConv)
