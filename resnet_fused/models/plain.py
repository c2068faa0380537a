"""The paper's plain counterpart of a residual block: the same two convolutions, and no shortcut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.nn import call


class PlainBlock(nn.Module):
    """Two 3x3 convolutions in a chain: `relu(bn2(conv2(relu(bn1(conv1(x))))))`.

    Parameters and keys are those of a `BasicBlock` without `downsample`: layers of both can be compared by name.

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: of `conv1`.
        device, dtype: of the parameters.
    """

    expansion = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False, **where)
        self.bn1 = nn.BatchNorm2d(planes, **where)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False, **where)
        self.bn2 = nn.BatchNorm2d(planes, **where)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, inplanes, H, W]` to `[N, planes, H / stride, W / stride]`."""
        y = call.conv_bn_act(x, self.conv1, self.bn1, self.relu)
        return call.conv_bn_act(y, self.conv2, self.bn2, self.relu)
