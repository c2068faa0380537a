"""A basic block as anybody may write it, which others differ from in one thing each."""

from __future__ import annotations

from torch import nn


def conv3(a=4, b=4, **options):
    return nn.Conv2d(a, b, 3, padding=1, bias=False, **options)


class Block(nn.Module):
    """A basic block under names of its own."""

    def __init__(self, channels=4):
        super().__init__()
        self.first, self.second = conv3(channels, channels), conv3(channels, channels)
        self.norm_a, self.norm_b = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.extra = self.make_extra()

    def make_extra(self):
        return nn.Identity()

    def forward(self, x):
        out = self.act(self.norm_a(self.first(x)))
        out = self.extra(self.norm_b(self.second(out)))
        return self.act(out + x)
