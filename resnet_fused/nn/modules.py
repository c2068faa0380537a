"""Modules of one fused call each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.functional.common import Act, check_act
from resnet_fused.nn import call
from resnet_fused.nn.scripting import NotScriptable
from resnet_fused.nn.sync import KeepsActivation, init_with_act


class BatchNormAct2d(KeepsActivation, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with a residual add and a ReLU behind it: `y = act(bn(x) + residual)`.

    Parameters, buffers, state_dict and errors are those of `nn.BatchNorm2d`, which
    `nn.SyncBatchNorm.convert_sync_batchnorm` turns into a `SyncBatchNormAct2d`.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype: as in `nn.BatchNorm2d`, and so is what else the
            installed PyTorch has, such as `bias` since 2.14.
        act: `"relu"` or None; by name.
    """

    __init__ = init_with_act(nn.BatchNorm2d)
    _plain_batch_norm = KeepsActivation.forward


class ConvBNAct2d(NotScriptable, nn.Module):
    """Convolution, batch norm, residual add and ReLU: `y = act(bn(conv(x)) + residual)`.

    Its state_dict holds `conv.*` and `bn.*`, those of the two plain modules.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as in `nn.Conv2d`;
            `padding=None` keeps the size at stride 1.
        eps, momentum: as in `nn.BatchNorm2d`.
        act: `"relu"` or None.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        act: Act = "relu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.relu = check_act(act, type(self).__name__)
        if padding is None:
            padding = dilation * (kernel_size - 1) // 2
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **where)
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, **where)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """act(bn(conv(x)) + residual); `x` is `[N, C, H, W]`, `residual` of the result's shape."""
        activation = "relu" if self.relu else None
        return call.conv_bn_act(x, self.conv, self.bn, None, activation=activation, residual=residual)


class Stem(NotScriptable, nn.Module):
    """The stem of an ImageNet ResNet: 7x7 convolution of stride 2, batch norm, ReLU, 3x3 max pool of stride 2.

    The names `conv1`, `bn1` and `maxpool` are those of torchvision and timm.

    Args:
        in_channels: of the picture, usually 3.
        out_channels: 64 in the paper.
        device, dtype: of the parameters.
    """

    def __init__(
        self, in_channels: int = 3, out_channels: int = 64, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_channels, out_channels, 7, 2, 3, bias=False, **where)
        self.bn1 = nn.BatchNorm2d(out_channels, **where)
        self.maxpool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` to `[N, out_channels, H/4, W/4]`, each half rounded up."""
        return call.conv_bn_act_max_pool(x, self.conv1, self.bn1, None, self.maxpool)
