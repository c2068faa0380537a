"""The paper's three shortcuts: A, zero-padded; B, projections where the shape changes; C, projections everywhere."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["A", "B", "C"]
SHORTCUTS: tuple[Shortcut, ...] = ("A", "B", "C")


class ZeroPadShortcut(nn.Module):
    """Option A, without parameters: every `stride`-th pixel, zeros for the channels that are missing.

    `y[:, :in_channels] = x[:, :, ::stride, ::stride]`, `y[:, in_channels:] = 0`.

    Args:
        in_channels: C of the input.
        out_channels: channels of the output, at least `in_channels`.
        stride: in both directions.

    Raises:
        ValueError: there are fewer channels behind it than before it.

    Source: He et al., section 3.3; the identity's channels come first.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        if out_channels < in_channels:
            raise ValueError(
                f"ZeroPadShortcut: out_channels {out_channels} must be at least in_channels {in_channels}; "
                "it only adds channels"
            )
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, H, W]` to `[N, out_channels, ceil(H / stride), ceil(W / stride)]`."""
        if self.stride > 1:  # as a pool of one pixel, because a strided slice would lose channels_last order
            x = F.avg_pool2d(x, 1, self.stride)
        return F.pad(x, (0, 0, 0, 0, 0, self.out_channels - self.in_channels))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


def make_shortcut(option: Shortcut, inputs: int, outputs: int, stride: int, **where: Any) -> nn.Module | None:
    """The shortcut of a block from `inputs` to `outputs` channels; None is the identity."""
    if option != "C" and stride == 1 and inputs == outputs:
        return None
    if option == "A":
        return ZeroPadShortcut(inputs, outputs, stride)
    conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False, **where)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs, **where))
