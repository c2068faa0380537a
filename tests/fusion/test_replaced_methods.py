"""Whoever replaces a forward - of a module, of a PyTorch class, of a block's own class - wants it to be run."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_same
from torch import Tensor, nn

import resnet_fused.nn
from resnet_fused import freeze, fuse, report, unfuse
from resnet_fused.fusion import BlockPlan, plan_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Base(nn.Module):
    factor = 1.0

    def __init__(self, a, b, stride=1, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), norm(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), norm(b)
        self.relu, self.drop, self.downsample = nn.ReLU(), nn.Identity(), None
        if stride != 1:
            self.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(a, b, 1, bias=False), norm(b))

    def branch(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.drop(self.bn2(self.conv2(x)))

    def forward(self, x):
        y = self.branch(x)
        if self.factor != 1.0:
            y = y * self.factor
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Block(Base):
    def forward(self, x):
        return super().forward(x)


class OwnNorm(nn.Module):
    """A batch norm by what it computes."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def helper(self, x, vector):
        return x - vector.reshape(1, -1, 1, 1)

    def forward(self, x):
        return self.helper(x, self.running_mean) / (self.running_var + self.eps).sqrt().reshape(1, -1, 1, 1)


class Net(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, 1, 1, bias=False), norm(4), nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer = nn.Sequential(Block(4, 6, 2, norm), Block(6, 6, norm=norm))
        self.tail = nn.Sequential(nn.Conv2d(6, 4, 1), norm(4), nn.ReLU())

    def forward(self, x):
        return self.features(x).flatten(2).mean(2)

    def features(self, x):
        return self.tail(self.layer(self.maxpool(self.relu(self.bn1(self.conv1(x))))))


def picture():
    return torch.randn(2, 3, 12, 12, dtype=torch.float64)


def make(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return Net(norm).double()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` meanwhile."""
    inherited = name not in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if inherited else setattr(owner, name, before)


def doubled(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, *args, **kwargs: 2 * method(self, *args, **kwargs)


def on_class(owner: type, name: str, make_value: Callable[..., Any] = doubled) -> Callable[[], Any]:
    return lambda: replaced(owner, name, make_value(getattr(owner, name)))


def called_only(cls: type, method: Callable[..., Any]) -> Callable[..., Any]:
    """A `__call__` that changes what modules of this class return."""
    return lambda self, *args: 2 * method(self, *args) if type(self) is cls else method(self, *args)


# What is replaced, and the batch norms of the network in which that shows.
CLASSES: dict[str, tuple[Callable[[], Any], Callable[..., nn.Module]]] = {
    "ReLU": (on_class(nn.ReLU, "forward", lambda _: lambda self, x: F.leaky_relu(x, 0.3)), nn.BatchNorm2d),
    "Conv2d": (on_class(nn.Conv2d, "forward"), nn.BatchNorm2d),
    "Conv2d, circular": (on_class(nn.Conv2d, "_conv_forward"), nn.BatchNorm2d),
    "BatchNorm2d": (on_class(nn.BatchNorm2d, "forward"), nn.BatchNorm2d),
    "the base of BatchNorm2d": (on_class(nn.modules.batchnorm._BatchNorm, "forward"), nn.BatchNorm2d),
    "SyncBatchNorm": (on_class(nn.SyncBatchNorm, "forward"), nn.SyncBatchNorm),
    "MaxPool2d": (on_class(nn.MaxPool2d, "forward"), nn.BatchNorm2d),
    "AvgPool2d": (on_class(nn.AvgPool2d, "forward"), nn.BatchNorm2d),
    "Identity": (on_class(nn.Identity, "forward"), nn.BatchNorm2d),
    "Sequential": (on_class(nn.Sequential, "forward"), nn.BatchNorm2d),
    "__call__ of all": (on_class(nn.Module, "__call__", lambda m: called_only(nn.ReLU, m)), nn.BatchNorm2d),
    "__call__ of Conv2d": (on_class(nn.Conv2d, "__call__"), nn.BatchNorm2d),
    "a block": (on_class(Block, "forward"), nn.BatchNorm2d),
    "the base of a block": (on_class(Base, "forward"), nn.BatchNorm2d),
    "a block's helper": (on_class(Base, "branch"), nn.BatchNorm2d),
    "a block's constant": (lambda: replaced(Block, "factor", 0.5), nn.BatchNorm2d),
    "the model's helper": (on_class(Net, "features"), nn.BatchNorm2d),
    "a norm of its own": (on_class(OwnNorm, "forward"), OwnNorm),
    "its helper": (on_class(OwnNorm, "helper"), OwnNorm),
    "__call__ of a norm of its own": (on_class(OwnNorm, "__call__"), OwnNorm),
    "our own norm": (on_class(resnet_fused.nn.BatchNormAct2d, "forward"), None),
}  # fmt: skip


def norms(kind):
    return kind or (lambda channels: resnet_fused.nn.BatchNormAct2d(channels, act=None))


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_changed_after_fuse(name):
    change, kind = CLASSES[name]
    plain, x = make(norms(kind)), picture()
    fused = fuse(copy.deepcopy(plain))
    before = report(fused)
    assert_same(plain, fused, x, steps=1)
    unchanged = plain.eval()(x)
    with change():
        assert not torch.allclose(plain(x), unchanged)
        assert_same(plain, fused, x, steps=1)
        report(fused)  # binds what is recognised now
        assert_same(plain, fused, x, steps=1)
    assert_same(plain, fused, x, steps=1)
    assert report(fused) == before


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_changed_before_fuse(name):
    change, kind = CLASSES[name]
    plain = make(norms(kind))
    with change():
        fused = fuse(copy.deepcopy(plain))
        assert_same(plain, fused, picture(), steps=1)
    assert_same(plain, fused, picture(), steps=1)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("when", ["before fuse", "after fuse"])
def test_a_class_changed_before_freeze(name, when):
    change, kind = CLASSES[name]
    plain, x = make(norms(kind)).eval(), picture()
    fused = fuse(copy.deepcopy(plain)) if when == "after fuse" else plain
    with change(), torch.no_grad():
        torch.testing.assert_close(freeze(fused, x)(x), plain(x), rtol=1e-9, atol=1e-9)


# --- one module's own -------------------------------------------------------------------------------------------------


def circular(conv: nn.Conv2d) -> None:
    """What makes a network's pictures tile without a seam."""

    def conv_forward(self, x, weight, bias):
        x = F.pad(x, 2 * self.padding[::-1], mode="circular")
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    conv._conv_forward = types.MethodType(conv_forward, conv)


def negated(conv: nn.Conv2d) -> None:
    conv._conv_forward = lambda x, weight, bias: -F.conv2d(x, weight, bias)


def twice(module: nn.Module) -> None:
    forward = type(module).forward
    module.forward = types.MethodType(lambda self, x: 2 * forward(self, x), module)


MODULES = {
    "_conv_forward": ("layer.1.conv2", circular),
    "_conv_forward in the stem": ("conv1", circular),
    "_conv_forward in a shortcut": ("layer.0.downsample.1", negated),
    "conv": ("layer.1.conv1", twice),
    "norm": ("layer.1.bn2", twice),
    "relu": ("layer.1.relu", twice),
    "identity": ("layer.1.drop", twice),
    "max pool": ("maxpool", twice),
    "average pool": ("layer.0.downsample.0", twice),
    "shortcut": ("layer.0.downsample", twice),
    "stage": ("layer", twice),
    "sequential of units": ("tail", twice),
    "block": ("layer.1", twice),
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", MODULES)
def test_a_forward_of_one_module(name, when):
    path, act = MODULES[name]
    plain, x = make(), picture()
    fused = copy.deepcopy(plain)
    if when == "after":
        assert_same(plain, fuse(fused), x, steps=1)
    unchanged = plain.eval()(x)
    for model in (plain, fused):
        act(model.get_submodule(path))
    fuse(fused)
    assert not torch.allclose(plain.eval()(x), unchanged)
    assert_same(plain, fused, x, steps=1)
    with torch.no_grad():
        for model in (plain, fused):
            torch.testing.assert_close(freeze(model.eval(), x)(x), plain.eval()(x), rtol=1e-9, atol=1e-9)


# --- reports, and our own modules -------------------------------------------------------------------------------------


def test_report_says_which_class_was_changed():
    fused = fuse(make())
    with replaced(nn.Conv2d, "_conv_forward", doubled(nn.Conv2d._conv_forward)):
        reasons = dict(report(fused).skipped)
        assert reasons["conv1"] == "`conv1` is a Conv2d with a forward that was replaced"
        assert dict(report(fused).fused)[""] == "bn1-relu"
    circular(fused.conv1)
    assert dict(report(fused).skipped)["conv1"] == "`conv1` is a Conv2d with a forward that was replaced"
    assert isinstance(plan_of(fused.layer[1]), BlockPlan)


def native_blocks() -> Iterator[tuple[nn.Module, int]]:
    projection = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
    yield resnet_fused.nn.BasicBlock(4, 6, 2, projection), 4
    yield resnet_fused.nn.Bottleneck(4, 1), 4
    yield resnet_fused.nn.Stem(3, 4), 3
    yield resnet_fused.nn.ConvBNAct2d(3, 4, 3), 3


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Sequential, nn.MaxPool2d])
def test_our_own_modules_run_what_was_put_into_pytorchs_classes(kind, cls):
    """Each call of a changed class is seen, once."""
    block, channels = [*native_blocks()][kind]
    x, seen = torch.randn(2, channels, 8, 8), []
    forward = cls.forward
    expected = [type(m) for m in block.modules()].count(cls)
    if cls is nn.ReLU:
        expected *= len([m for m in block.modules() if isinstance(m, nn.Conv2d)]) - (kind == 0)
    for training in (True, False):
        seen.clear()
        with replaced(cls, "forward", lambda self, *args: seen.append(self) or forward(self, *args)):
            block.train(training)(x)
        assert len(seen) == expected


@pytest.mark.parametrize("cls", [resnet_fused.nn.BasicBlock, resnet_fused.nn.ConvBNAct2d])
def test_a_forward_put_into_our_own_classes(cls):
    block = nn.Sequential(cls(4, 4, 1)).eval()
    x = torch.randn(2, 4, 6, 6)
    own = cls.forward
    with replaced(cls, "forward", lambda self, x: 2 * own(self, x)), torch.no_grad():
        expected = block(x)
        torch.testing.assert_close(fuse(copy.deepcopy(block))(x), expected)
        torch.testing.assert_close(freeze(block, x)(x), expected)


def test_a_compiled_model_runs_what_was_replaced_before_it_was_compiled():
    torch._dynamo.reset()
    plain, x = make().eval(), picture()
    fused = fuse(copy.deepcopy(plain))
    fused(x)
    with replaced(nn.ReLU, "forward", lambda self, x: F.leaky_relu(x, 0.3)), torch.no_grad():
        compiled = torch.compile(fused, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-9, atol=1e-9)


def test_a_wrapped_forward_outlives_the_fusion():
    """As accelerate and others do it: the bound forward is kept, and called by what takes its place."""
    plain, x = make().eval(), picture()
    fused = fuse(copy.deepcopy(plain))
    wrapped = fused.forward
    fused.forward = lambda x: wrapped(x) + 1
    torch.testing.assert_close(fused(x), plain(x) + 1, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(unfuse(fused)(x), plain(x) + 1, rtol=1e-9, atol=1e-9)
