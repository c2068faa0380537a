"""Frozen blocks as one call: what their convolutions give one by one, where that may be done, and nowhere else."""

from __future__ import annotations

import contextlib
import copy
import random

import pytest
import torch
from networks import randomised
from torch import nn

from resnet_fused import Int8, freeze
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
    made, original = [], cpu.Steps.__call__

    def counted(self, x):
        made.append(sum(step.op == cpu.CONV for step in self))
        return original(self, x)

    monkeypatch.setattr(cpu.Steps, "__call__", counted)
    return made


def _one_by_one(frozen):
    frozen = copy.deepcopy(frozen)
    for module in frozen.modules():
        if hasattr(module, "one_call"):
            module.one_call = None
    return frozen


def _dense(y):
    return y.dense() if isinstance(y, Quantised) else y


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_one_call_that_gives_the_bits_of_its_convolutions_one_by_one(kind, stage, calls):
    frozen, x = _frozen(kind, stage)
    kept, apart = x.clone(), _one_by_one(frozen)
    calls.clear()
    for given in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(3, 16, 5, 12).to(x.dtype), x[:0]):
        expected, found = apart(given), frozen(given)
        assert found.shape == expected.shape and found.dtype == expected.dtype and torch.equal(found, expected)
        assert found.is_contiguous() == expected.is_contiguous()
    convolutions = {"basic": 8, "bottlenecks": 11, "grouped": 8, "identity_first": 5, "twice": 10}
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
    assert seen == [1] and calls == [3, 3, 11], "the block with a hook runs one by one"


class _EveryModule:
    """A hook on all modules there are."""

    def __init__(self):
        self.seen = set()
        self.handle = nn.modules.module.register_module_forward_hook(lambda module, *_: self.seen.add(module))

    def close(self):
        self.handle.remove()


def test_hooks_run_whenever_they_come(calls):
    frozen, x = _frozen("float32")
    expected, seen = frozen(x), []
    calls.clear()
    handle = frozen.network.stage[1].branch[1].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(frozen(x), expected) and seen == [1]
    assert calls == [4, 3], "the block with a hook runs one by one"
    handle.remove()
    assert torch.equal(frozen(x), expected) and seen == [1] and calls == [4, 3, 11]
    with contextlib.closing(_EveryModule()) as every:
        assert torch.equal(frozen(x), expected) and calls == [4, 3, 11]
    assert frozen.network.stage[0].branch[0] in every.seen


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
    one_call = frozen.one_call
    assert isinstance(one_call, OneCall)
    frozen(x)
    kind = (torch.float32, None)
    made = one_call._calls[kind]
    frozen(torch.cat([x, x]))
    assert one_call._calls == {kind: made}


class _Classifier(nn.Module):
    """A stem, two blocks and a head, called as torchvision does."""

    def __init__(self, head, flatten, pool=None):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.maxpool, self.layer1 = nn.MaxPool2d(3, 2, 1), _identity_first()
        self.avgpool, self.fc, self._flatten = pool or nn.AdaptiveAvgPool2d((1, 1)), head, flatten

    def forward(self, x):
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self._flatten(self.avgpool(x)))


FLATTENS = {
    "function": lambda x: torch.flatten(x, 1),
    "method": lambda x: x.flatten(1),
    "keyword": lambda x: torch.flatten(x, start_dim=1),
}
HEADS = {
    "linear": lambda: nn.Linear(16, 10),
    "two": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 24), nn.Identity(), nn.Linear(24, 10)),
}


def _classifier(kind, head="linear", flatten="function", pool=None):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    model = randomised(_Classifier(HEADS[head](), FLATTENS[flatten], pool)).eval().to(dtype)
    x = torch.randn(2, 3, 33, 30).to(dtype)
    return model, freeze(model, x, quantize=[x] if kind == "int8" else None), x


@pytest.mark.parametrize("flatten, head", [*((name, "linear") for name in FLATTENS), ("function", "two")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_is_one_call_from_its_input_to_its_logits(kind, flatten, head, calls):
    model, frozen, x = _classifier(kind, head, flatten)
    apart, kept = _one_by_one(frozen), x.clone()
    calls.clear()
    for given in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(3, 3, 20, 47).to(x.dtype), x[:0]):
        found, expected = frozen(given), apart(given)
        assert found.shape == (len(given), 10) and found.dtype == x.dtype and torch.equal(found, expected)
    assert calls == [{"linear": 6, "two": 7}[head]] * 4 and torch.equal(x, kept)
    with torch.no_grad():
        difference = (frozen(x) - model(x)).float().norm() / model(x).float().norm()
    assert difference < {"float32": 1e-5, "bfloat16": 3e-2, "int8": 0.1}[kind]


@pytest.mark.parametrize(
    "part",
    [
        {"flatten": lambda x: x.view(len(x), -1)},
        {"flatten": lambda x: torch.flatten(x, 1).relu()},
        {"flatten": lambda x: torch.flatten(x, 2).mean(2)},
        {"pool": nn.AvgPool2d(8)},
        {"pool": nn.AdaptiveMaxPool2d(1)},
    ],
)
def test_a_forward_that_does_more_keeps_its_stage_in_one_call_and_its_results(part, calls, monkeypatch):
    monkeypatch.setitem(FLATTENS, "this", part.get("flatten", FLATTENS["function"]))
    model, frozen, x = _classifier("float32", flatten="this", pool=part.get("pool"))
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-4)
    assert calls == [4]


@pytest.mark.skipif("int8" not in SUPPORTED, reason="this CPU has no int8")
def test_an_input_that_8_bits_cannot_hold_gets_the_error_of_one_by_one():
    _, frozen, x = _classifier("int8")
    x[1, 2, 3, 4] = float("inf")
    with pytest.raises(ValueError, match="the input holds a NaN or an infinity"):
        frozen(x)


@pytest.mark.skipif("int8" not in SUPPORTED, reason="this CPU has no int8")
def test_a_layer_kept_in_float_is_in_the_call_too_behind_a_check_of_the_input(calls):
    torch.manual_seed(0)
    model = randomised(_Classifier(nn.Linear(16, 10), FLATTENS["function"])).eval()
    x = torch.randn(2, 3, 33, 30)
    frozen = freeze(model, x, quantize=Int8([x], keep=("conv1",)))
    calls.clear()
    assert torch.equal(frozen(x), _one_by_one(frozen)(x)) and calls == [6]
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="the input holds a NaN or an infinity"):
        frozen(x)


class _PoolAndFlatten(nn.Module):
    """As timm's global pools."""

    def __init__(self):
        super().__init__()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten(1)

    def forward(self, x):
        return self.flatten(self.pool(x))


class _Draws(_PoolAndFlatten):
    def forward(self, x):
        return super().forward(x) * (1 + 0 * random.random())


class _Counts(_PoolAndFlatten):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class _Trunk(nn.Module):
    """A forward of one's own around blocks, in which nothing is to be fused."""

    def __init__(self, pool):
        super().__init__()
        self.stage, self.pool, self.fc = _identity_first(), pool, nn.Linear(16, 10)

    def forward(self, x):
        return self.fc(self.pool(self.stage(x)))


@pytest.mark.parametrize("pool, whole", [(_PoolAndFlatten, True), (_Draws, False), (_Counts, False)])
def test_a_module_of_ones_own_joins_the_call_unless_its_forward_does_more_than_compute(pool, whole, calls):
    torch.manual_seed(0)
    model, x = randomised(_Trunk(pool())).eval(), torch.randn(2, 16, 9, 8)
    frozen = freeze(model, x)
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-4)
    assert calls == [5 if whole else 4] and torch.equal(frozen(x), _one_by_one(frozen)(x))
    if pool is _Counts:
        before = frozen.network.pool.calls
        frozen(x)
        assert frozen.network.pool.calls == before + 1
