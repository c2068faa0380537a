"""Frozen blocks as one call: what their convolutions give one by one, where that may be done, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import randomised
from torch import nn

from resnet_fused import freeze
from resnet_fused.inference import FrozenBlock, FrozenStage
from resnet_fused.inference.int8 import Quantised
from resnet_fused.inference.one_call import OneCall
from resnet_fused.nn import BasicBlock, Bottleneck
from resnet_fused.ops import cpu

SUPPORTED = cpu.supported()
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="no AVX2, or the kernels for CPUs are not built")

KINDS = [
    pytest.param(name, marks=pytest.mark.skipif(name not in SUPPORTED, reason=f"this CPU has no {name}"))
    for name in ("float32", "bfloat16", "int8")
]


def _projection(inputs, outputs, stride):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def _basic():
    return nn.Sequential(BasicBlock(16, 32, 2, _projection(16, 32, 2)), BasicBlock(32, 32), BasicBlock(32, 32))


def _bottlenecks():
    return nn.Sequential(Bottleneck(16, 16, 2, _projection(16, 64, 2)), Bottleneck(64, 16), Bottleneck(64, 16))


def _grouped():
    first = Bottleneck(16, 8, 2, _projection(16, 32, 2), groups=4, base_width=64)
    return nn.Sequential(first, Bottleneck(32, 8, groups=4, base_width=64))


def _identity_first():
    return nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16))


def _twice():
    first, block, last = _basic()
    return nn.Sequential(first, block, block, last)


STAGES = {f.__name__[1:]: f for f in (_basic, _bottlenecks, _grouped, _identity_first, _twice)}


class _Net(nn.Module):
    """A convolution in front, so that a stage in int8 gets 8 bits."""

    def __init__(self, stage):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.stage = stage

    def forward(self, x):
        return self.stage(self.relu(self.bn(self.conv(x))))


def _frozen(kind, stage="bottlenecks"):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model = randomised(_Net(STAGES[stage]())).eval().to(dtype)
    x = torch.randn(2, 16, 9, 8).to(dtype)
    return freeze(model, x, quantize=[x] if kind == "int8" else None), x


@pytest.fixture
def calls(monkeypatch):
    """The number of convolutions in each call."""
    made, original = [], cpu.Convs.__call__

    def counted(self, x):
        made.append(len(self._scales) // 2)
        return original(self, x)

    monkeypatch.setattr(cpu.Convs, "__call__", counted)
    return made


def _one_by_one(frozen):
    frozen = copy.deepcopy(frozen)
    for module in frozen.modules():
        if isinstance(module, (FrozenBlock, FrozenStage)):
            module.one_call = None
    return frozen


def _dense(y):
    return y.dense() if isinstance(y, Quantised) else y


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_is_one_call_that_gives_the_bits_of_its_convolutions_one_by_one(kind, stage, calls):
    frozen, x = _frozen(kind, stage)
    kept, apart = x.clone(), _one_by_one(frozen)
    calls.clear()
    for given in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(3, 16, 5, 12).to(x.dtype), x[:0]):
        expected, found = apart(given), frozen(given)
        assert found.shape == expected.shape and found.dtype == expected.dtype and torch.equal(found, expected)
        assert found.is_contiguous() == expected.is_contiguous()
    convolutions = {"basic": 7, "bottlenecks": 10, "grouped": 7, "identity_first": 4, "twice": 9}
    assert calls == [convolutions[stage]] * 4 and torch.equal(x, kept)


def test_a_block_alone_is_one_call(calls):
    model = randomised(Bottleneck(16, 16, 2, _projection(16, 64, 2))).eval()
    x = torch.randn(1, 16, 6, 6)
    frozen = freeze(model, x)
    calls.clear()
    assert torch.equal(frozen(x), _one_by_one(frozen)(x)) and calls == [4]


def test_a_copy_runs_its_own_convolutions(calls):
    frozen, x = _frozen("float32")
    frozen(x)
    twin = copy.deepcopy(frozen)
    seen = []
    twin.network.stage[0].branch[0].register_forward_hook(lambda *_: seen.append(1))
    calls.clear()
    assert torch.equal(twin(x), frozen(x))
    assert seen == [1] and calls == [3, 3, 10], "the block with a hook runs one by one"


def test_hooks_run_whenever_they_come(calls):
    frozen, x = _frozen("float32")
    expected, seen = frozen(x), []
    calls.clear()
    handle = frozen.network.stage[1].branch[1].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(frozen(x), expected) and seen == [1]
    assert calls == [4, 3], "the block with a hook runs one by one"
    handle.remove()
    assert torch.equal(frozen(x), expected) and seen == [1] and calls == [4, 3, 10]


@pytest.mark.parametrize("bad", ["channels", "rank", "dtype", "too small"])
def test_a_wrong_input_gets_the_error_that_it_gets_one_by_one(bad):
    model = randomised(_bottlenecks()).eval()
    frozen = freeze(model, torch.randn(2, 16, 6, 6))
    x = {
        "channels": torch.randn(2, 24, 6, 6),
        "rank": torch.randn(2, 2, 16, 6, 6),
        "dtype": torch.randn(2, 16, 6, 6).double(),
        "too small": torch.randn(2, 16, 0, 6),
    }[bad]
    with pytest.raises(Exception) as one_by_one:  # noqa: PT011
        _one_by_one(frozen)(x)
    with pytest.raises(type(one_by_one.value)) as one_call:
        frozen(x)
    assert str(one_call.value) == str(one_by_one.value)


@pytest.mark.skipif("bfloat16" not in SUPPORTED, reason="this CPU has no bfloat16")
def test_under_autocast_a_stage_that_gets_float32_casts_it_as_one_by_one():
    model, x = randomised(_bottlenecks()).eval(), torch.randn(2, 16, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        frozen = freeze(model, x)
    assert torch.equal(frozen(x), _one_by_one(frozen)(x)) and frozen(x).dtype == torch.bfloat16


def _pooled():
    first, *others = _basic()
    first.downsample = nn.Sequential(nn.AvgPool2d(2), *_projection(16, 32, 1))
    return nn.Sequential(first, *others)


def _dilated():
    return nn.Sequential(Bottleneck(16, 4, dilation=2), Bottleneck(16, 4))


@pytest.mark.parametrize("stage, others", [(_pooled, [2, 2]), (_dilated, [3])])
def test_a_block_with_what_our_kernels_do_not_run_runs_one_by_one(stage, others, calls):
    model, x = stage(), torch.randn(2, 16, 8, 8)
    frozen = freeze(randomised(model).eval(), x)
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-4)
    assert calls == others


def test_a_call_is_made_once_for_what_the_input_stands_for():
    frozen, x = _frozen("float32")
    one_call = frozen.network.stage.one_call
    assert isinstance(one_call, OneCall)
    frozen(x)
    made = one_call._calls[None]
    frozen(torch.cat([x, x]))
    assert one_call._calls == {None: made}
