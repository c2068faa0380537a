"""How much a network computes."""

from __future__ import annotations

import copy

import torch
from torch import nn


def multiply_adds(model: nn.Module, size: int | tuple[int, int] = 224, in_channels: int = 3) -> int:
    """Multiply-adds of one picture in convolutions and fully connected layers, as the paper counts its "FLOPs".

    Args:
        model: takes `[1, in_channels, *size]`; is left alone, nothing is computed.
        size: of the picture, its side or (height, width).
        in_channels: of the picture.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton where it is installed

    height, width = (size, size) if isinstance(size, int) else size
    shadow = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(torch.empty(1, in_channels, height, width, device="meta"))
    return counter.get_total_flops() // 2
