"""A ResNet described by its convolutions."""

import pytest
import torchvision
from torch import nn

from resnet_fused._command import UsageError
from resnet_fused.measure import network


def test_every_convolution_and_its_operations_are_found():
    model = torchvision.models.resnext50_32x4d()
    net = network.describe(model)
    assert [layer.name for layer in net.layers] == [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert sum(layer.weights for layer in net.layers) == sum(
        m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)
    )


def test_what_is_no_resnet_is_refused_by_name():
    with pytest.raises(UsageError, match="features.3 is in no residual block"):
        network.describe(torchvision.models.vgg11())
    with pytest.raises(UsageError, match="layer1.0.conv1 is in no residual block"):
        network.networks("plain18", 224)


def test_our_own_networks_by_name():
    (net,) = network.networks("cifar_resnet20", 32)
    assert len(net.layers) == 19 and net.pooled is None and net.classes == 10
    assert all(block.shortcut is None and len(block.branch) == 2 for block in net.blocks)
