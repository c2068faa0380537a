"""The compute capability by which launch configurations and measured tables are chosen."""

from __future__ import annotations

import functools

import torch

from resnet_fused._compiling import constant

MIN_ARCH = 80


@constant
def arch(device: torch.device) -> int:
    """The compute capability times ten of a GPU, 80 for sm_80 and so on; of any other device the smallest supported."""
    return _arch(device)


@functools.cache
def _arch(device: torch.device) -> int:
    if device.type != "cuda":
        return MIN_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
