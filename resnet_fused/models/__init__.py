"""The networks of "Deep Residual Learning for Image Recognition" (He, Zhang, Ren, Sun, 2015), of the fused blocks.

`create("resnet50")` builds one by name, `list_models()` names them; parameters and state_dict keys are torchvision's.
"""

from resnet_fused.models.cost import multiply_adds
from resnet_fused.models.plain import PlainBlock
from resnet_fused.models.registry import create, list_models
from resnet_fused.models.resnet import ResNet
from resnet_fused.models.shortcut import ZeroPadShortcut
from resnet_fused.models.vgg import VGG, vgg19
from resnet_fused.models.zoo import (
    cifar_plain,
    cifar_resnet,
    plain18,
    plain34,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)

__all__ = [
    "PlainBlock",
    "ResNet",
    "VGG",
    "ZeroPadShortcut",
    "cifar_plain",
    "cifar_resnet",
    "create",
    "list_models",
    "multiply_adds",
    "plain18",
    "plain34",
    "resnet101",
    "resnet152",
    "resnet18",
    "resnet34",
    "resnet50",
    "vgg19",
]
