"""The launch of a persistent kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_fused.dispatch.conv import MULTIPROCESSORS
from resnet_fused.dispatch.device import arch
from resnet_fused.kernels._replay import never_replay


def launch(kernel: Any, x: Tensor, tiles: int, *args: Any, **options: Any) -> None:
    """Run `kernel` on the device of `x`, with one program for every multiprocessor; they share out the tiles."""
    never_replay()  # of descriptors, which hold addresses
    if x.device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    else:
        multiprocessors = MULTIPROCESSORS[arch(x.device)]
    with torch.cuda.device_of(x):
        kernel[(min(tiles, multiprocessors),)](*args, **options)
