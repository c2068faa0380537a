"""A small network with a stem, two bottlenecks and a classifier, whose blocks can be changed after they are fused."""

from __future__ import annotations

import torch
from torch import nn


class Bottleneck(nn.Module):
    """A bottleneck in torchvision's terms, with timm's places for more."""

    def __init__(self, inplanes=8, planes=4, stride=1):
        super().__init__()
        out = 4 * planes
        self.conv1, self.bn1 = nn.Conv2d(inplanes, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        self.drop_path = None
        self.scale = 1.0
        if stride != 1 or inplanes != out:
            self.downsample = nn.Sequential(nn.Conv2d(inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.drop_path is not None:
            out = self.drop_path(out)
        if self.scale != 1.0:
            out = out * self.scale
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.layer = nn.Sequential(Bottleneck(8, 4, 2), Bottleneck(16, 4))
        self.fc = nn.Linear(16, 5)
        self.grad_checkpointing = False

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        if self.grad_checkpointing:
            x = torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)
        else:
            x = self.layer(x)
        return self.fc(x.mean((2, 3)))


def picture():
    return torch.randn(2, 3, 16, 16, dtype=torch.float64)


ALL_FUSED = [
    ("", "conv1-bn1-relu"),
    (
        "layer.0",
        "Bottleneck: conv1-bn1-relu, conv2-bn2-relu, conv3-bn3-add-relu; shortcut downsample.0-downsample.1",
    ),
    ("layer.1", "Bottleneck: conv1-bn1-relu, conv2-bn2-relu, conv3-bn3-add-relu"),
]
