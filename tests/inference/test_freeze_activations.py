"""SiLU and Hardswish behind a batch norm: part of the frozen convolution, a pass of their own in a fused model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_same
from contract import assert_no_worse
from networks import AVAILABLE, DEVICE
from tiers import larger
from torch import nn

from resnet_fused import freeze, fuse, report, unfuse, use_backend
from resnet_fused.kernels import _tile
from resnet_fused.ops.activations import ACTIVATIONS

ACTS = ("silu", "hardswish")


class _Norm(nn.BatchNorm2d):
    """As timm's: the activation is called in the forward of the norm."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.act = ACTIVATIONS[act].module()

    def forward(self, x):
        return self.act(super().forward(x))


class _Net(nn.Module):
    """Spelled as a module, in place, as a function, inside a norm, and behind a sum."""

    def __init__(self, act):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if k == 0 else 8, 8, 3, padding=1, bias=k == 2) for k in range(5))
        self.norms = nn.ModuleList([*(nn.BatchNorm2d(8) for _ in range(4)), _Norm(8, act)])
        self.act, self.in_place = ACTIVATIONS[act].module(), ACTIVATIONS[act].module(inplace=True)
        self.function = ACTIVATIONS[act].function

    def forward(self, x):
        first = self.act(self.norms[0](self.convs[0](x)))
        y = self.in_place(self.norms[1](self.convs[1](first)))
        y = self.function(self.norms[2](self.convs[2](y)))
        y = self.act(self.norms[3](self.convs[3](y)) + first)
        return self.norms[4](self.convs[4](y))


class _Functional(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.forward = {"silu": self._silu, "hardswish": self._hardswish}[act]

    def _silu(self, x):
        return F.silu(self.norm(self.conv(x)), inplace=True)

    def _hardswish(self, x):
        return F.hardswish(self.norm(self.conv(x)))


def net(act, dtype=torch.float32):
    torch.manual_seed(0)
    model = _Net(act)
    for norm in model.norms:
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
    return model.eval().to(DEVICE, dtype, memory_format=torch.channels_last)


def pictures(dtype=torch.float32):
    return torch.randn(2, 3, 7, 6).to(DEVICE, dtype, memory_format=torch.channels_last) * 3


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, larger(torch.float16), larger(torch.float64)], ids=str
)
@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_frozen_network_is_the_plain_one(act, dtype, backend):
    model, x = net(act, dtype), pictures(dtype)
    with use_backend(backend):
        frozen = freeze(model, x)
        y = frozen(x)
    fused = [row.fused for row in frozen.plan.layers]
    assert fused == [f"batch norm, {act}"] * 3 + [f"batch norm, residual, {act}", f"batch norm, {act}"]
    with torch.no_grad():
        assert_no_worse(y, nn.Module.__call__, (model, x), norm=True)


@pytest.mark.parametrize("act", ACTS)
def test_a_fused_model_trains_as_the_plain_one(act):
    plain = net(act, torch.float64)
    fused = fuse(copy.deepcopy(plain))
    assert [reason for _, reason in report(fused).skipped] == []
    assert str(report(fused).fused[0][1]).startswith(f"convs.0-norms.0-{act}")
    assert_same(plain, fused, pictures(torch.float64))
    assert type(unfuse(fused)) is _Net


@pytest.mark.parametrize("act", ACTS)
def test_what_was_exchanged_afterwards_is_run(act):
    plain = net(act, torch.float64)
    fused = fuse(copy.deepcopy(plain))
    for model in (plain, fused):
        model.act = nn.GELU()
    assert_same(plain, fused, pictures(torch.float64), steps=1)
    for model in (plain, fused):
        model.act = nn.ReLU()
    assert_same(plain, fused, pictures(torch.float64), steps=1)
    for model in (plain, fused):
        model.in_place.register_forward_hook(lambda module, inputs, y: y + 1)
    assert_same(plain, fused, pictures(torch.float64), steps=1)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_stay_where_plain_pytorch_keeps_them(act, backend, value):
    model, x = net(act), pictures()
    x[0, 1, 2, 3] = value
    with use_backend(backend), torch.no_grad():
        y, expected = freeze(model, pictures())(x), model(x)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


def test_each_activation_has_its_kernel():
    assert list(_tile.ACTIVATIONS) == [None, *ACTIVATIONS]
