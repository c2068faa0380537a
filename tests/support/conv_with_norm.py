"""Convolutions that hold their norm and activation, and residual blocks of them, as detection libraries have them."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class Conv2d(nn.Conv2d):
    """A convolution that calls `norm` and `activation` behind itself, as detectron2's does."""

    def __init__(self, *args, norm=None, activation=None, **options):
        super().__init__(*args, **options)
        self.norm = norm
        self.activation = activation

    def forward(self, x):
        if not torch.jit.is_scripting():
            with warnings.catch_warnings(record=True):
                if x.numel() == 0 and self.training:
                    assert not isinstance(self.norm, nn.SyncBatchNorm), "SyncBatchNorm does not support empty inputs!"
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


class FrozenBatchNorm2d(nn.Module):
    """A fixed affine map, written in two ways that the input's need of a gradient chooses from, as detectron2's."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.num_features, self.eps = channels, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0 - eps)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = (self.bias - self.running_mean * scale).reshape(1, -1, 1, 1)
            return x * scale.reshape(1, -1, 1, 1).to(x.dtype) + bias.to(x.dtype)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps)


class FrozenByTorch(FrozenBatchNorm2d):
    """The same, as newer versions write it."""

    def forward(self, x):
        vectors = (self.running_mean, self.running_var)
        if x.requires_grad:
            return torch.batch_norm(x, self.weight, self.bias, *vectors, False, 0.1, self.eps, True)
        return F.batch_norm(x, *vectors, self.weight, self.bias, training=False, eps=self.eps)


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """Averages the statistics of all processes, if there are any, as detectron2's."""

    def forward(self, x):
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if world == 1 or not self.training:
            return super().forward(x)
        raise NotImplementedError("the sum over all processes")


class Bottleneck(nn.Module):
    """detectron2's BottleneckBlock, and with two convolutions its BasicBlock."""

    def __init__(self, norm, channels=4, out=8, stride=1, convolutions=3):
        super().__init__()
        sizes = {3: [(channels, 4, 1), (4, 4, 3), (4, out, 1)], 2: [(channels, out, 3), (out, out, 3)]}[convolutions]
        for k, (a, b, size) in enumerate(sizes, 1):
            own = stride if k == convolutions - 1 else 1
            conv = Conv2d(a, b, size, stride=own, padding=size // 2, bias=False, norm=norm(b))
            self.add_module(f"conv{k}", conv)
        self.shortcut = None
        if (channels, stride) != (out, 1):
            self.shortcut = Conv2d(channels, out, 1, stride=stride, bias=False, norm=norm(out))

    def forward(self, x):
        out = x
        for name in [name for name in ("conv1", "conv2", "conv3") if hasattr(self, name)]:
            if out is not x:
                out = F.relu_(out)
            out = getattr(self, name)(out)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out += shortcut
        return F.relu_(out)


class Stem(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv1 = Conv2d(3, 4, 7, stride=2, padding=3, bias=False, norm=norm(4))

    def forward(self, x):
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class Backbone(nn.Module):
    """detectron2's ResNet, which returns a dict of features, and asks for the shape of its input."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = Stem(norm)
        self.res2 = nn.Sequential(Bottleneck(norm), Bottleneck(norm, 8, 8))
        self.res3 = nn.Sequential(Bottleneck(norm, 8, 8, 2, convolutions=2), Bottleneck(norm, 8, 8, convolutions=2))

    def forward(self, x):
        assert x.dim() == 4, f"a picture has four dimensions, not {x.shape}"
        features = {}
        x = self.stem(x)
        for name in ("res2", "res3"):
            x = features[name] = getattr(self, name)(x)
        return features


class Pyramid(nn.Module):
    """Convolutions with a norm and without, called in a loop, one of them on every level."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.lateral = nn.ModuleList(Conv2d(8, 4, 1, norm=norm(4)) for _ in range(2))
        self.shared = Conv2d(4, 4, 3, padding=1, norm=norm(4), activation=F.relu)
        self.last = Conv2d(4, 4, 1, activation=nn.ReLU())

    def forward(self, features):
        if len(features) == 0:
            raise ValueError("no features")
        out = [self.shared(lateral(x)) for lateral, x in zip(self.lateral, features.values(), strict=True)]
        return [self.last(x) for x in out]


class ConvModule(nn.Module):
    """mmcv's: what is called, in which order, is data, and the norm is found by its name."""

    def __init__(self, a, b, size=3, norm=nn.BatchNorm2d, act=True, order=("conv", "norm", "act")):
        super().__init__()
        self.order = order
        self.with_norm, self.with_activation = norm is not None, act
        self.conv = nn.Conv2d(a, b, size, padding=size // 2, bias=norm is None)
        self.norm_name = "bn"
        self.efficient_conv_bn_eval_forward = None
        if norm is not None:
            self.add_module(self.norm_name, norm(b if order.index("norm") > order.index("conv") else a))
        if act:
            self.activate = nn.ReLU(inplace=True)

    @property
    def norm(self):
        return getattr(self, self.norm_name)

    def forward(self, x, activate=True, norm=True):
        layer = 0
        while layer < len(self.order):
            kind = self.order[layer]
            if kind == "conv":
                follows = layer + 1 < len(self.order) and self.order[layer + 1] == "norm" and norm and self.with_norm
                if follows and not self.norm.training and self.efficient_conv_bn_eval_forward is not None:
                    raise NotImplementedError
                x = self.conv(x)
            elif kind == "norm" and norm and self.with_norm:
                x = self.norm(x)
            elif kind == "act" and activate and self.with_activation:
                x = self.activate(x)
            layer += 1
        return x


class NamedNorms(nn.Module):
    """mmdet's BasicBlock: norms found by their names, the inner part checkpointed on demand."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1_name, self.norm2_name = "bn1", "bn2"
        for name in (self.norm1_name, self.norm2_name):
            self.add_module(name, nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        self.with_cp = False

    @property
    def norm1(self):
        return getattr(self, self.norm1_name)

    @property
    def norm2(self):
        return getattr(self, self.norm2_name)

    def forward(self, x):
        def inner(x):
            identity = x
            out = self.relu(self.norm1(self.conv1(x)))
            out = self.norm2(self.conv2(out))
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return out

        if self.with_cp and x.requires_grad:
            raise NotImplementedError("checkpoint")
        return self.relu(inner(x))
