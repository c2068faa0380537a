"""VGG-19, the network the paper compares its own with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.nn import call

VGG19_STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # (channels, 3x3 convolutions); a max pool ends each


class VGGFeatures(nn.Sequential):
    """The convolutional trunk; convolution, batch norm and ReLU in a row run as one fused call."""

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` to `[N, C, H / 32, W / 32]`."""
        layers = list(self)
        while layers:
            if len(layers) > 2 and isinstance(layers[1], nn.BatchNorm2d):
                conv, bn, act = layers[:3]
                x, layers = call.conv_bn_act(x, conv, bn, act), layers[3:]
            else:
                x, layers = layers[0](x), layers[1:]
        return x


class VGG(nn.Module):
    """VGG-19: sixteen 3x3 convolutions, five max pools, three fully connected layers, with torchvision's keys.

    Args:
        num_classes: of the classifier.
        batch_norm: a batch norm behind each convolution, as in torchvision's `vgg19_bn`.
        in_channels: of the picture.
        dropout: in the classifier, of training.
        device, dtype: of the parameters.

    Source: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014, column E.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        batch_norm: bool = False,
        in_channels: int = 3,
        dropout: float = 0.5,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        for channels, convolutions in VGG19_STAGES:
            for _ in range(convolutions):
                layers.append(nn.Conv2d(in_channels, channels, 3, padding=1, **where))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(channels, **where))
                layers.append(nn.ReLU(inplace=True))
                in_channels = channels
            layers.append(nn.MaxPool2d(2, 2))
        self.features = VGGFeatures(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096, **where),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096, **where),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes, **where),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` to `[N, 512, H / 32, W / 32]`."""
        return self.features(x)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` to logits `[N, num_classes]`."""
        return self.classifier(torch.flatten(self.avgpool(self.forward_features(x)), 1))


def vgg19(num_classes: int = 1000, **options: Any) -> VGG:
    """VGG-19 without batch norm, as published.

    Args:
        num_classes: of the classifier.
        options: keyword arguments of `VGG`.
    """
    return VGG(num_classes, **options)
