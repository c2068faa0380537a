"""Networks by name."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from resnet_fused.models import vgg, zoo

_IMAGENET: dict[str, Callable[..., nn.Module]] = {
    "plain18": zoo.plain18,
    "plain34": zoo.plain34,
    "resnet18": zoo.resnet18,
    "resnet34": zoo.resnet34,
    "resnet50": zoo.resnet50,
    "resnet101": zoo.resnet101,
    "resnet152": zoo.resnet152,
    "resnet50_v1": functools.partial(zoo.resnet50, version="v1"),
    "resnet101_v1": functools.partial(zoo.resnet101, version="v1"),
    "resnet152_v1": functools.partial(zoo.resnet152, version="v1"),
    "vgg19": vgg.vgg19,
    "vgg19_bn": functools.partial(vgg.vgg19, batch_norm=True),
}
_CIFAR: dict[str, Callable[..., nn.Module]] = {"cifar_resnet": zoo.cifar_resnet, "cifar_plain": zoo.cifar_plain}
_CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)


def list_models() -> list[str]:
    """The names that `create` takes; those of the CIFAR family also with any other depth 6n + 2."""
    return [*_IMAGENET, *(f"{family}{depth}" for family in _CIFAR for depth in _CIFAR_DEPTHS)]


def create(name: str, **options: Any) -> nn.Module:
    """The network of this name, initialised at random, in training mode.

    Args:
        name: one of `list_models()`, or `cifar_resnet<depth>`, `cifar_plain<depth>` of any depth 6n + 2.
        options: keyword arguments of the network's own function, such as `num_classes`, `shortcut`, `stem`,
            `zero_init_residual`, `device`, `dtype`.

    Raises:
        ValueError: there is no network of that name; the message names close ones. Or an option has a bad value.
    """
    if name in _IMAGENET:
        return _IMAGENET[name](**options)
    cifar = re.fullmatch(r"(cifar_resnet|cifar_plain)(\d+)", name)
    if cifar is not None:
        return _CIFAR[cifar[1]](int(cifar[2]), **options)
    names = difflib.get_close_matches(name, list_models()) or list_models()
    raise ValueError(f"unknown model {name!r}; choose one of {', '.join(names)}")
