"""Pooling in frozen networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import dispatch
from resnet_fused.inference.int8 import Quantised
from resnet_fused.inference.value import Apart, Value
from resnet_fused.nn.eligibility import untouched
from resnet_fused.ops import cpu


class FrozenMaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` on our kernel where it takes the operands, leaving a tensor in 8 bits: the largest stays so.

    Attributes:
        ours: no backend was forced when the model was frozen.
    """

    ours = True

    def forward(self, x: Tensor) -> Tensor:
        filter, stride, padding, dilation = map(_pair, (self.kernel_size, self.stride, self.padding, self.dilation))
        given = x.eight() if isinstance(x, Quantised) else x
        if not self.ceil_mode and dilation == [1, 1] and self.ours and cpu.pools(given, filter, padding):
            y = cpu.max_pool(given, filter, stride, padding)
        elif not isinstance(x, Quantised):
            return super().forward(x)
        elif x.signed:  # fp16 has all of its values, and PyTorch's pool takes no int8 on a GPU
            y = super().forward(given.half()).to(torch.int8, memory_format=torch.channels_last)
        else:
            y = torch.ops.quantized.max_pool2d(given, filter, stride, padding, dilation, self.ceil_mode)
        return Quantised(y, x.grid, x.dtype, x.nchw) if isinstance(x, Quantised) else y

    def join_call(self, x: Value) -> Value:
        filter, stride, padding, dilation = map(_pair, (self.kernel_size, self.stride, self.padding, self.dilation))
        if self.ceil_mode or dilation != [1, 1] or not self.ours or x.pixels == "none":
            raise Apart
        return replace(x, number=x.steps.max_pool(x.number, filter, stride, padding, x.element), pixels="many")


class FrozenGlobalAvgPool2d(nn.AdaptiveAvgPool2d):
    """`nn.AdaptiveAvgPool2d(1)` on our kernel where it takes the operands; it sums a tensor in 8 bits as it is.

    Attributes:
        ours: no backend was forced when the model was frozen.
    """

    ours = True

    def forward(self, x: Tensor) -> Tensor:
        given = x.eight() if isinstance(x, Quantised) else x
        if self.ours and cpu.averages(given):
            return cpu.mean(given, x.grid if isinstance(x, Quantised) else None, x.dtype)
        return super().forward(x)

    def join_call(self, x: Value) -> Value:
        if not self.ours or x.pixels == "none":
            raise Apart
        return replace(x, number=x.steps.mean(x.number, x.grid, x.dtype), grid=None, pixels="one")


def freeze_pools(network: nn.Module) -> None:
    """Every plain `nn.MaxPool2d` of the network becomes a `FrozenMaxPool2d`, and global average pools likewise."""
    for module in network.modules():
        if type(module) is nn.AdaptiveAvgPool2d and untouched(module, nn.AdaptiveAvgPool2d):
            if module.output_size in (1, (1, 1)):
                module.__class__ = FrozenGlobalAvgPool2d
                module.ours = dispatch.forced_backend() is None  # type: ignore[assignment]
        elif type(module) is nn.MaxPool2d and untouched(module, nn.MaxPool2d) and not module.return_indices:
            module.__class__ = FrozenMaxPool2d
            module.ours = dispatch.forced_backend() is None  # type: ignore[assignment]


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
