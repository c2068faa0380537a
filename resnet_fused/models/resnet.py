"""The network that all residual and plain nets of the paper are instances of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from resnet_fused.models.plain import PlainBlock
from resnet_fused.models.shortcut import SHORTCUTS, Shortcut, make_shortcut
from resnet_fused.nn import BasicBlock, Bottleneck, call

Stem = Literal["imagenet", "small"]
STEMS: tuple[Stem, ...] = ("imagenet", "small")
Block = type[BasicBlock] | type[Bottleneck] | type[PlainBlock]


class ResNet(nn.Module):
    """Stem, stages of blocks, global average pool, classifier: `fc(avgpool(layerN(... layer1(stem(x)))))`.

    Names, parameters, initialisation and state_dict are those of `torchvision.models.ResNet`. The first block of every
    stage but the first halves the picture.

    Args:
        block: `BasicBlock`, `Bottleneck` or, for a plain net, `PlainBlock`.
        depths: blocks in each stage, `layer1`, `layer2` and so on.
        widths: `planes` of the blocks of each stage.
        num_classes: of the classifier.
        in_channels: of the picture.
        stem: `"imagenet"`, a 7x7 convolution of stride 2 and a max pool, or `"small"`, a 3x3 convolution of stride 1.
        shortcut: the paper's option `"A"`, `"B"` or `"C"`; plain nets have none.
        stride_in_1x1: the paper's v1 bottleneck, with the stride in its first convolution; v1.5 has it in the 3x3.
        zero_init_residual: gamma of the last batch norm of each residual branch starts at zero, which makes every block
            `relu(shortcut(x))`.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown stem or shortcut, `depths` and `widths` of different lengths, a plain net asked for
            zero-initialised residual branches, a stride in the first 1x1 of blocks without one.

    Source: He et al., 2015, table 1, section 4.2 and figure 3; initialisation of He et al., "Delving Deep into
    Rectifiers", 2015 (fan-out); `zero_init_residual` of Goyal et al., 2017.
    """

    def __init__(
        self,
        block: Block,
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        stem: Stem = "imagenet",
        shortcut: Shortcut = "B",
        stride_in_1x1: bool = False,
        zero_init_residual: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for what, value, choices in (("stem", stem, STEMS), ("shortcut", shortcut, SHORTCUTS)):
            if value not in choices:
                raise ValueError(f"ResNet: unknown {what} {value!r}; choose one of {', '.join(map(repr, choices))}")
        if not depths or len(depths) != len(widths) or min(depths) < 1:
            raise ValueError(f"ResNet: depths {tuple(depths)} and widths {tuple(widths)} must be as many, and >= 1")
        if zero_init_residual and block is PlainBlock:
            raise ValueError("ResNet: zero_init_residual=True, but a plain net has no residual branches")
        if stride_in_1x1 and block is not Bottleneck:
            raise ValueError(f"ResNet: stride_in_1x1=True needs Bottleneck blocks, not {block.__name__}")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        first = widths[0] if stem == "small" else 64
        kernel, stride, padding = (3, 1, 1) if stem == "small" else (7, 2, 3)
        self.conv1 = nn.Conv2d(in_channels, first, kernel, stride, padding, bias=False, **where)
        self.bn1 = nn.BatchNorm2d(first, **where)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else None
        self.stages = tuple(f"layer{i}" for i in range(1, len(depths) + 1))
        inplanes = first
        for i, (name, depth, planes) in enumerate(zip(self.stages, depths, widths, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                options = {**where, "stride_in_1x1": True} if stride_in_1x1 else where
                if block is not PlainBlock:
                    options = {
                        **options,
                        "downsample": make_shortcut(shortcut, inplanes, planes * block.expansion, stride, **where),
                    }
                blocks.append(block(inplanes, planes, stride, **options))
                inplanes = planes * block.expansion
            self.add_module(name, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inplanes, num_classes, **where)
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, (BasicBlock, Bottleneck)):
                    nn.init.zeros_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's activations, `[N, C, H / 32, W / 32]` of an ImageNet net."""
        if self.maxpool is None:
            x = call.conv_bn_act(x, self.conv1, self.bn1, self.relu)
        else:
            x = call.conv_bn_act_max_pool(x, self.conv1, self.bn1, self.relu, self.maxpool)
        for name in self.stages:
            x = getattr(self, name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` to logits `[N, num_classes]`."""
        return self.fc(torch.flatten(self.avgpool(self.forward_features(x)), 1))
