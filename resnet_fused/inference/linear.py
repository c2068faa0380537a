"""Linear layers, such as the classifier, in frozen networks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from resnet_fused.functional.common import autocast, operand_dtype
from resnet_fused.inference.conv import Constants
from resnet_fused.inference.value import Apart, Value
from resnet_fused.nn.eligibility import untouched
from resnet_fused.ops import cpu

LARGEST = 1 << 23  # weights that are held twice, as the parameter and packed: a classifier's, not the 10^8 of VGG's


class FrozenLinear(Constants, nn.Linear):
    """`nn.Linear` of rows as a 1x1 convolution of single pixels, on our kernel for CPUs.

    Attributes:
        dtype: the one that autocast gave when the model was frozen.
        packed_weight, packed_bias: of `cpu.pack` and `cpu.pack_channels`, for it.
    """

    dtype: torch.dtype
    packed_weight: Tensor
    packed_bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        (rows,) = autocast(x)
        if rows.dim() != 2 or rows.shape[1] != self.in_features or rows.dtype is not self.dtype:
            return super().forward(x)
        pixels = rows.contiguous().view(*rows.shape, 1, 1)
        one = ((1, 1), (1, 1), (0, 0))
        y = cpu.conv(pixels, self.packed_weight, self.packed_bias, None, self.out_features, *one, None)
        return y.view(len(rows), self.out_features)

    def join_call(self, x: Value) -> Value:
        if x.pixels != "none" or x.dtype is not self.dtype:
            raise Apart
        tensors, one = (self.packed_weight, None, self.packed_bias), ((1, 1), (1, 1), (0, 0), 1)
        y = x.steps.conv(x.number, None, tensors, self.out_features, *one, None, self.dtype)
        return replace(x, number=y)


def freeze_linears(network: nn.Module) -> None:
    """Every plain `nn.Linear` that our kernel takes becomes a `FrozenLinear`."""
    for module in network.modules():
        if type(module) is not nn.Linear or not untouched(module, nn.Linear) or module.weight.numel() > LARGEST:
            continue
        weight, bias = module.weight.detach(), module.bias
        kernel = weight.to(operand_dtype(weight))[..., None, None]
        if cpu.refusal(kernel, (1, 1), (0, 0), (1, 1), 1, None) is None:
            module.__class__ = FrozenLinear
            assert isinstance(module, FrozenLinear)
            module.dtype = kernel.dtype
            module.constant("packed_weight", cpu.pack(kernel))
            values = torch.zeros(module.out_features) if bias is None else bias.detach().to(kernel.dtype)
            module.constant("packed_bias", cpu.pack_channels(values))
