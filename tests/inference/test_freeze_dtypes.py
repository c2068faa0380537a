"""Every combination of input, weights and autocast: what plain PyTorch computes a frozen model computes, in its dtype;
what PyTorch refuses it refuses, in PyTorch's words.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from contract import assert_within_contract
from torch import nn

from resnet_fused import freeze, use_backend
from resnet_fused.inference import FrozenConv

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
OFF = None, torch.bfloat16, torch.float16


class _Block(nn.Module):
    def __init__(self, inputs, width, outputs, kernels):
        super().__init__()
        sizes = [inputs, *[width] * (len(kernels) - 1), outputs]
        for k, (before, after, kernel) in enumerate(zip(sizes, sizes[1:], kernels, strict=False), start=1):
            setattr(self, f"conv{k}", nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False))
            setattr(self, f"bn{k}", nn.BatchNorm2d(after))
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


class _Basic(_Block):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, outputs, (3, 3))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class _Bottleneck(_Block):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs // 2, outputs, (1, 3, 1))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class _Net(nn.Module):
    """A stem and two blocks; all of it, or the blocks alone, may run under an autocast of the forward's own."""

    def __init__(self, block, inside):
        super().__init__()
        self.inside = inside
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4)
        self.layer = nn.Sequential(block(4, 8), block(8, 8))
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.normal_(m.running_mean, 0, 0.1)
                nn.init.uniform_(m.running_var, 0.5, 1.5)

    def stem(self, x):
        return self.bn(self.conv(x)).relu()

    def forward(self, x):
        if self.inside is None:
            return self.layer(self.stem(x))
        where, dtype = self.inside
        x = x if where == "around all" else self.stem(x)
        with _autocast(dtype):
            return self.layer(self.stem(x) if where == "around all" else x)


def _autocast(dtype):
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def _outcome(function, *args):
    """What a function returns, or what it raises."""
    try:
        with torch.no_grad():
            return function(*args), None
    except (RuntimeError, ValueError) as error:
        return None, (type(error), str(error))


def _agrees(ours, plain, dtype, given):
    """Whether it is the plain model's exception, in words of ours where another dtype is given."""
    if plain is None or ours is None or dtype == given:
        return ours == plain
    return ours[0] is plain[0] and f"input of {given}; convert it, as in x.to({dtype})" in ours[1]


def _check(model, outside, backend):
    """Frozen for an input of each dtype, called with one of each."""
    truth = copy.deepcopy(model).double()
    truth.inside = None
    inputs = [torch.randn(2, 3, 5, 5).to(dtype) for dtype in DTYPES]

    def plain(x):
        with _autocast(outside):
            return model(x)

    def frozen_for(example):
        with _autocast(outside), use_backend(backend):
            return freeze(model, example)

    for example in inputs:
        frozen, problem = _outcome(frozen_for, example)
        assert _agrees(problem, _outcome(plain, example)[1], model.conv.weight.dtype, example.dtype)
        if frozen is None:
            continue
        assert any(isinstance(module, FrozenConv) for module in frozen.network.layer.modules())
        for x in inputs:
            (expected, problem), (actual, ours) = _outcome(plain, x), _outcome(frozen, x)
            assert _agrees(ours, problem, example.dtype, x.dtype)
            if problem is None:
                assert_within_contract(actual, expected, truth(x.double()).detach())


@pytest.mark.parametrize("outside", OFF)
@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("inside", [None, *itertools.product(("around all", "around the blocks"), OFF)])
def test_frozen_is_plain_whatever_autocast_does(inside, weights, outside, one_thread):
    _check(_Net(_Basic, inside).eval().to(weights), outside, "auto")


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("inside", [None, ("around the blocks", torch.bfloat16), ("around the blocks", None)])
@pytest.mark.parametrize("outside", [None, torch.bfloat16])
def test_bottlenecks_on_every_backend(inside, outside, backend, one_thread):
    _check(_Net(_Bottleneck, inside).eval(), outside, backend)
