"""What the cost model and the tuner need to know of a ResNet: its convolutions, with their shapes, block by block."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnet_fused._command import UsageError, one_line
from resnet_fused.dispatch.conv import ConvShape
from resnet_fused.measure import models

_BRANCH = ("conv1", "conv2", "conv3")


@dataclass(frozen=True)
class Layer:
    """A convolution for one image (n = 1)."""

    name: str
    shape: ConvShape

    @property
    def weights(self) -> int:
        s = self.shape
        return s.k * (s.c // s.groups) * s.r * s.s

    @property
    def flops(self) -> int:
        """Of its fprop; a multiply-add is two."""
        return 2 * self.weights * self.shape.p * self.shape.q


@dataclass(frozen=True)
class Block:
    """A residual block: the convolutions of its branch in order, and the projection, if any, of its shortcut."""

    name: str
    branch: tuple[Layer, ...]
    shortcut: Layer | None

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.branch if self.shortcut is None else (*self.branch, self.shortcut)


@dataclass(frozen=True)
class Network:
    """A stem convolution (with or without a max pool behind it), residual blocks, average pool, one linear layer."""

    stem: Layer
    pooled: int | None  # elements behind the max pool
    blocks: tuple[Block, ...]
    classes: int

    @property
    def layers(self) -> tuple[Layer, ...]:
        return (self.stem, *(layer for block in self.blocks for layer in block.layers))


def describe(model: nn.Module, image_size: int = 224) -> Network:
    """The network of a ResNet in torchvision's form, by running a copy of it on shapes alone.

    Raises:
        UsageError: the model is no ResNet in that form; the message names the first module that does not fit.
    """
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    order: list[str] = []
    module = copy.deepcopy(model).eval().to("meta")
    watched = {n: m for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.MaxPool2d | nn.Linear)}

    def watch(name: str, inner: nn.Module) -> None:
        def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            shapes[name] = (inputs[0].shape, output.shape)
            order.append(name)

        inner.register_forward_hook(note)

    for name, inner in watched.items():
        watch(name, inner)
    try:
        _run_on_shapes(module, image_size)
    except Exception as error:
        raise UsageError(f"--image-size {image_size}: the model takes no such pictures: {one_line(error)}") from None

    def layer(name: str) -> Layer:
        conv = watched[name]
        assert isinstance(conv, nn.Conv2d)
        (n, c, h, w), _ = shapes[name]
        r, s = conv.kernel_size
        geometry = (conv.stride, conv.padding, conv.dilation)
        return Layer(name, ConvShape(n, c, h, w, conv.out_channels, r, s, *geometry, conv.groups))  # type: ignore[arg-type]

    convolutions = [name for name in order if isinstance(watched[name], nn.Conv2d)]
    if len(set(order)) < len(order) or not convolutions:
        raise UsageError("the cost model knows ResNets, in which every layer runs once")
    blocks, known = [], {convolutions[0]}
    for name, inner in module.named_modules():
        branch = [f"{name}.{part}" for part in _BRANCH if f"{name}.{part}" in shapes]
        if not hasattr(inner, "downsample") or len(branch) < 2:  # None in a block whose shortcut is the identity
            continue
        own = [conv for conv in convolutions if conv.startswith(f"{name}.")]
        projection = [conv for conv in own if conv not in branch]
        if len(projection) > 1:
            raise UsageError(f"the cost model knows one projection a block; {name} has {', '.join(projection)}")
        known.update(own)
        blocks.append(Block(name, tuple(map(layer, branch)), layer(projection[0]) if projection else None))
    strangers = [name for name in convolutions if name not in known]
    if strangers or not blocks:
        what = f"{strangers[0]} is in no residual block" if strangers else "there is no residual block in this model"
        raise UsageError(f"the cost model knows ResNets of one stem convolution and residual blocks: {what}")
    pools = [name for name in order if isinstance(watched[name], nn.MaxPool2d)]
    linear = [name for name in order if isinstance(watched[name], nn.Linear)]
    pooled = shapes[pools[0]][1].numel() if pools else None
    return Network(layer(convolutions[0]), pooled, tuple(blocks), shapes[linear[-1]][1].numel() if linear else 0)


def _run_on_shapes(module: nn.Module, image_size: int) -> None:
    with torch.inference_mode():
        module(torch.empty(1, 3, image_size, image_size, device="meta"))


def check_size(name: str, image_size: int) -> None:
    """Raise UsageError where a model takes no pictures of this size, which shapes alone tell."""
    try:
        module = build(name).eval()
        _run_on_shapes(module, models.CALIBRATED)
    except Exception:  # a model that does not run on shapes alone: nothing is known before it is built
        return
    try:
        _run_on_shapes(module, image_size)
    except Exception as error:
        raise UsageError(f"--image-size {image_size}: {name} takes no such pictures: {one_line(error)}") from None


def build(name: str) -> nn.Module:
    """The model of this name without memory behind it: torchvision's, timm's as `timm:<name>`, or ours."""
    ours = importlib.util.find_spec("resnet_fused.models") and importlib.import_module("resnet_fused.models")
    with torch.device("meta"):
        if name.startswith("timm:") or name in models.names() or not ours:
            models.check(name)
            if name.startswith("timm:"):
                model: nn.Module = importlib.import_module("timm").create_model(name.removeprefix("timm:"))
                return model
            return importlib.import_module("torchvision.models").get_model(name, weights=None)
        try:
            return ours.create(name)
        except ValueError as error:
            raise UsageError(str(error)) from None


def networks(model: str | nn.Module | Iterable[str], image_size: int, rehearse: bool = False) -> list[Network]:
    """Of a model, a name or several names; for a rehearsal one tiny network instead."""
    if rehearse:
        return [tiny_network()]
    if isinstance(model, nn.Module):
        return [describe(model, image_size)]
    return [describe(build(name), image_size) for name in ([model] if isinstance(model, str) else model)]


def tiny_network() -> Network:
    """Every kind of layer a ResNet has, on images of 16x16 and a few channels: for rehearsals."""

    def layer(name: str, c: int, size: int, k: int, filter: int, stride: int = 1) -> Layer:
        padding = (filter // 2, filter // 2)
        return Layer(name, ConvShape(1, c, size, size, k, filter, filter, (stride, stride), padding))

    first = (layer("a.conv1", 16, 4, 16, 1), layer("a.conv2", 16, 4, 16, 3, 2), layer("a.conv3", 16, 2, 32, 1))
    second = (layer("b.conv1", 32, 2, 16, 1), layer("b.conv2", 16, 2, 16, 3), layer("b.conv3", 16, 2, 32, 1))
    blocks = (Block("a", first, layer("a.downsample", 16, 4, 32, 1, 2)), Block("b", second, None))
    return Network(layer("stem", 3, 16, 16, 7, 2), 16 * 4 * 4, blocks, 10)
