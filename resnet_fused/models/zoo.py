"""The residual and plain nets of the paper, one function each. `options` are the keyword arguments of `ResNet`."""

from __future__ import annotations

from typing import Any, Literal

from resnet_fused.models.plain import PlainBlock
from resnet_fused.models.resnet import ResNet
from resnet_fused.nn import BasicBlock, Bottleneck

Version = Literal["v1", "v1.5"]
CIFAR_WIDTHS = (16, 32, 64)


def resnet18(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-18.

    Args:
        num_classes: of the classifier.
        options: keyword arguments of `ResNet`.
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, **options)


def resnet34(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-34.

    Args:
        num_classes: of the classifier.
        options: keyword arguments of `ResNet`.
    """
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes=num_classes, **options)


def resnet50(num_classes: int = 1000, *, version: Version = "v1.5", **options: Any) -> ResNet:
    """ResNet-50.

    Args:
        num_classes: of the classifier.
        version: `"v1.5"`, or `"v1"`, the paper's, with the stride of a bottleneck in its first 1x1.
        options: keyword arguments of `ResNet`.
    """
    return _bottlenecks((3, 4, 6, 3), num_classes, version, options)


def resnet101(num_classes: int = 1000, *, version: Version = "v1.5", **options: Any) -> ResNet:
    """ResNet-101.

    Args:
        num_classes: of the classifier.
        version: `"v1.5"`, or `"v1"`, the paper's, with the stride of a bottleneck in its first 1x1.
        options: keyword arguments of `ResNet`.
    """
    return _bottlenecks((3, 4, 23, 3), num_classes, version, options)


def resnet152(num_classes: int = 1000, *, version: Version = "v1.5", **options: Any) -> ResNet:
    """ResNet-152.

    Args:
        num_classes: of the classifier.
        version: `"v1.5"`, or `"v1"`, the paper's, with the stride of a bottleneck in its first 1x1.
        options: keyword arguments of `ResNet`.
    """
    return _bottlenecks((3, 8, 36, 3), num_classes, version, options)


def plain18(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-18 without its shortcuts.

    Args:
        num_classes: of the classifier.
        options: keyword arguments of `ResNet`.
    """
    return ResNet(PlainBlock, (2, 2, 2, 2), num_classes=num_classes, **options)


def plain34(num_classes: int = 1000, **options: Any) -> ResNet:
    """ResNet-34 without its shortcuts.

    Args:
        num_classes: of the classifier.
        options: keyword arguments of `ResNet`.
    """
    return ResNet(PlainBlock, (3, 4, 6, 3), num_classes=num_classes, **options)


def cifar_resnet(depth: int, num_classes: int = 10, **options: Any) -> ResNet:
    """The paper's ResNet for 32 x 32 pictures: 6n + 2 layers of widths 16, 32, 64, shortcut option A.

    Args:
        depth: 6n + 2; 20, 32, 44, 56, 110 and 1202 in the paper.
        num_classes: of the classifier.
        options: keyword arguments of `ResNet`.

    Raises:
        ValueError: `depth` is not of that form.

    Source: He et al., 2015, section 4.2.
    """
    return _cifar("cifar_resnet", BasicBlock, depth, num_classes, {"shortcut": "A", **options})


def cifar_plain(depth: int, num_classes: int = 10, **options: Any) -> ResNet:
    """`cifar_resnet` without its shortcuts.

    Args:
        depth: 6n + 2.
        num_classes: of the classifier.
        options: keyword arguments of `ResNet`.

    Raises:
        ValueError: `depth` is not of that form.
    """
    return _cifar("cifar_plain", PlainBlock, depth, num_classes, options)


def _bottlenecks(depths: tuple[int, ...], num_classes: int, version: Version, options: dict[str, Any]) -> ResNet:
    if version not in ("v1", "v1.5"):
        raise ValueError(f"unknown version {version!r} of a bottleneck ResNet; choose 'v1' or 'v1.5'")
    return ResNet(Bottleneck, depths, num_classes=num_classes, stride_in_1x1=version == "v1", **options)


def _cifar(function: str, block: Any, depth: int, num_classes: int, options: dict[str, Any]) -> ResNet:
    n, remainder = divmod(depth - 2, 6)
    if n < 1 or remainder:
        raise ValueError(f"{function}: depth {depth} is not 6n + 2; choose 8, 14, 20, 32, 44, 56, 110, 1202 or another")
    return ResNet(block, (n, n, n), num_classes=num_classes, **{"widths": CIFAR_WIDTHS, "stem": "small", **options})
