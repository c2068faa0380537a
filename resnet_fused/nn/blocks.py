"""The two residual blocks of He et al., with torchvision's constructor arguments and state_dict keys.

Source: Deep Residual Learning for Image Recognition, 2015, figure 5; the stride in the 3x3 of `Bottleneck` ("v1.5") as
in torchvision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.nn import call
from resnet_fused.nn.eligibility import untouched
from resnet_fused.nn.scripting import NotScriptable
from resnet_fused.nn.sums import INTO_BRANCH


def residual_block(
    x: Tensor,
    layers: list[tuple[nn.Module, nn.Module, nn.Module | None]],
    shortcut: tuple[nn.Module, nn.Module] | None,
) -> Tensor:
    """relu(bn(conv(... relu(bn(conv(x))))) + shortcut(x)): the function of both blocks.

    As in torchvision the shortcut is added into the branch, whose dtype and shape the result keeps.

    Args:
        x: `[N, C, H, W]`.
        layers: (conv, bn, act) in order; `act` None where ReLU is called as a function. The last one's ReLU follows
            the sum.
        shortcut: (conv, bn) of a projection, or None for the identity.
    """
    fused = call.conv_bn_chain(x, layers, shortcut, add=INTO_BRANCH)
    if fused is not None:
        return fused
    identity = x if shortcut is None else call.conv_bn_act(x, *shortcut, None, activation=None)
    y = x
    for conv, bn, act in layers[:-1]:
        y = call.conv_bn_act(y, conv, bn, act)
    conv, bn, act = layers[-1]
    return call.conv_bn_act(y, conv, bn, act, residual=identity, add=INTO_BRANCH)


class _Block(NotScriptable, nn.Module):
    """What both blocks share: an optional projection and the one forward."""

    downsample: nn.Module | None

    def _layers(self) -> list[tuple[nn.Module, nn.Module, nn.Module | None]]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """`[N, inplanes, H, W]` to `[N, planes * expansion, H / stride, W / stride]`."""
        projection = self.downsample
        if projection is None:
            return residual_block(x, self._layers(), None)
        if type(projection) is nn.Sequential and len(projection) == 2 and untouched(projection, nn.Sequential):
            return residual_block(x, self._layers(), (projection[0], projection[1]))
        *inner, (conv, bn, act) = self._layers()
        y = x
        for layer in inner:
            y = call.conv_bn_act(y, *layer)
        return call.conv_bn_act(y, conv, bn, act, residual=projection(x), add=INTO_BRANCH)


class BasicBlock(_Block):
    """Two 3x3 convolutions: `relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`.

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: of `conv1`.
        downsample: the projection of the shortcut, or None for the identity.
        dilation: of both convolutions.
        device, dtype: of the parameters.
    """

    expansion = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        dilation: int = 1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, dilation, dilation, bias=False, **where)
        self.bn1 = nn.BatchNorm2d(planes, **where)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, dilation, dilation, bias=False, **where)
        self.bn2 = nn.BatchNorm2d(planes, **where)
        self.downsample = downsample

    def _layers(self) -> list[tuple[nn.Module, nn.Module, nn.Module | None]]:
        return [(self.conv1, self.bn1, self.relu), (self.conv2, self.bn2, self.relu)]


class Bottleneck(_Block):
    """1x1, 3x3, 1x1 convolutions: `relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))`.

    Args:
        inplanes: channels of the input.
        planes: a quarter of the channels of the output.
        stride: of the 3x3 convolution.
        downsample: the projection of the shortcut, or None for the identity.
        groups, base_width: ResNeXt and wide ResNet: the 3x3 has `int(planes * base_width / 64) * groups` channels.
        dilation: of the 3x3 convolution.
        stride_in_1x1: the paper's v1, with the stride in `conv1`.
        device, dtype: of the parameters.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        stride_in_1x1: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        width = int(planes * (base_width / 64.0)) * groups
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(inplanes, width, 1, first, bias=False, **where)
        self.bn1 = nn.BatchNorm2d(width, **where)
        self.conv2 = nn.Conv2d(width, width, 3, second, dilation, dilation, groups, bias=False, **where)
        self.bn2 = nn.BatchNorm2d(width, **where)
        self.conv3 = nn.Conv2d(width, planes * self.expansion, 1, bias=False, **where)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion, **where)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def _layers(self) -> list[tuple[nn.Module, nn.Module, nn.Module | None]]:
        return [(self.conv1, self.bn1, self.relu), (self.conv2, self.bn2, self.relu), (self.conv3, self.bn3, self.relu)]
