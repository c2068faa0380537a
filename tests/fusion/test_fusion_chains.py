"""Chains conv-bn(-relu) and bn-relu outside residual blocks: which are fused, and that the rest of a forward stays."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_same, count_units
from torch import nn

from resnet_fused import use_backend
from resnet_fused.fusion import SequencePlan, fuse, plan_of, report


def conv3x3(a=4, b=4, **options):
    return nn.Conv2d(a, b, 3, padding=1, bias=False, **options)


class Net(nn.Module):
    """A root with a stem, a module between, a second chain, a bn-relu and a bn alone."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(3, 4), nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(2)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv3, self.bn3 = conv3x3(), nn.BatchNorm2d(4)
        self.drop_rate = 0.0
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

    def forward(self, x, scale=1.0):
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.bn2(x))
        x = self.bn3(self.conv3(x))
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        x = x.mean((2, 3), keepdim=True).view(x.size(0), -1, 1, 1)
        return self.head(x * scale)


class ModeDependent(nn.Module):
    """Returns a dict in training and a tensor in evaluation, and calls its modules from lists and dicts."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([conv3x3(3, 4), conv3x3(4, 4, groups=2)])
        self.norms = nn.ModuleDict({"a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4, track_running_stats=False)})

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms.values(), strict=True):
            x = norm(conv(x)).relu()
        return {"main": x, "aux": x.mean()} if self.training else x


class DenseLayer(nn.Module):
    """Takes a list, as torchvision's DenseNet does, or a tensor."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(6), conv3x3(6, 2)

    def forward(self, x):
        x = [x] if isinstance(x, torch.Tensor) else x
        return self.conv(F.relu(self.norm(torch.cat(x, 1))))


class InPlaceOnInput(nn.Module):
    """Changes its input, and then the input of a chain that has begun."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv3x3(3, 4).requires_grad_(False), nn.BatchNorm2d(4)

    def forward(self, x):
        x += 1
        y = self.conv(x.detach())
        n = x.size(0)
        n += 1
        x *= 2
        return F.relu(self.bn(y)) * n, x


class TwoInputs(nn.Module):
    """A decoder step: the skip connection is joined before the chain."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.scale = conv3x3(6, 4), nn.BatchNorm2d(4), nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x, skip):
        return F.relu(self.bn(self.conv(torch.cat([x, skip], 1)))) * self.scale


def sequential():
    return nn.Sequential(
        conv3x3(3, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 8, 1), nn.Identity(), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.BatchNorm2d(8), nn.ReLU(),
        conv3x3(8, 8, padding_mode="circular"), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1),
    )  # fmt: skip


CHAINS = [
    (Net, ["conv1-bn1-relu", "bn2-relu", "conv3-bn3"], [(2, 3, 8, 8)]),
    (ModeDependent, ["convs.0-norms.a-relu", "convs.1-norms.b-relu"], [(2, 3, 6, 6)]),
    (DenseLayer, ["norm-relu"], [[(2, 2, 4, 4), (2, 4, 4, 4)]]),
    (DenseLayer, ["norm-relu"], [(2, 6, 4, 4)]),
    (InPlaceOnInput, ["conv-bn-relu"], [(2, 3, 6, 6)]),
    (TwoInputs, ["conv-bn-relu"], [(2, 2, 6, 6), (2, 4, 6, 6)]),
    (sequential, ["0-1-relu", "3-5", "7-relu", "10-relu"], [(2, 3, 6, 6)]),
]


@pytest.mark.parametrize(("make", "units", "shapes"), CHAINS)
def test_chains_are_fused_and_agree(make, units, shapes, monkeypatch):
    calls = count_units(monkeypatch)
    torch.manual_seed(0)
    plain = make().double()
    fused = fuse(copy.deepcopy(plain))
    plan = plan_of(fused)
    assert isinstance(plan, SequencePlan)
    assert [str(unit) for unit in plan.units] == units

    def make_input(shape):
        return [make_input(s) for s in shape] if isinstance(shape, list) else torch.randn(shape, dtype=torch.float64)

    assert_same(plain, fused, *map(make_input, shapes))
    assert len(calls) == (0 if make is DenseLayer and isinstance(shapes[0], tuple) else 3 * len(units))


def test_what_a_plan_leaves_alone_is_named():
    assert report(fuse(nn.Sequential(*sequential()))).skipped == [("9", "the convolution pads in mode 'circular'")]


class SharedNormChain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = conv3x3(), conv3x3(), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn(self.b(F.relu(self.bn(self.a(x))))))


class UsedTwice(SharedNormChain):
    def forward(self, x):
        y = self.a(x)
        return F.relu(self.bn(y)), y


class OwnWeight(SharedNormChain):
    def forward(self, x):
        return F.relu(self.bn(self.a(x))), self.a.weight.square().sum()


class RetainedNorm(SharedNormChain):
    def forward(self, x):
        y = self.bn(self.a(x))
        return F.relu(y, inplace=True), y


@pytest.mark.parametrize(
    ("make", "fused", "left_alone"),
    [
        (SharedNormChain, [], [("bn", "`bn` is called 2 times")]),
        (UsedTwice, [("", "bn-relu")], []),
        (OwnWeight, [("", "bn-relu")], [("a", "the forward that calls `a` also reads its parameters")]),
        (RetainedNorm, [("", "a-bn")], []),
    ],
)
def test_values_that_others_use_stay(make, fused, left_alone):
    plain = make().double()
    model = fuse(copy.deepcopy(plain))
    result = report(model)
    assert (result.fused, result.skipped) == (fused, left_alone)
    assert_same(plain, model, torch.randn(2, 4, 6, 6, dtype=torch.float64))


class FunctionInForward(nn.Module):
    """Hands its input to C++ that looks at types."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * 2

    def __init__(self):
        super().__init__()
        self.conv, self.bn = conv3x3(), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn(self.conv(self.Double.apply(x))))


class ForwardArguments(FunctionInForward):
    def forward(self, x, *rest, **options):
        return self.bn(self.conv(x))


@pytest.mark.parametrize(
    ("make", "reason"), [(FunctionInForward, "its forward"), (ForwardArguments, "its forward takes *rest")]
)
def test_other_forwards_are_explained(make, reason):
    model = fuse(make())
    assert type(model) is make and reason in report(model).skipped[0][1]


class _Stem(nn.Module):
    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = nn.Conv2d(3, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.ReLU(), pool

    def forward(self, x):
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_stems_pool_joins_its_chain(backend):
    plain = _Stem(nn.MaxPool2d(3, 2, 1))
    fused = fuse(copy.deepcopy(plain))
    assert "conv1-bn1-relu-maxpool" in repr(fused)
    with use_backend(backend):
        assert_same(plain, fused, torch.randn(2, 3, 13, 14), tolerance=1e-4)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2, 2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(3, 2, 1)])
def test_other_pools_stay_outside(pool):
    fused = fuse(_Stem(pool))
    assert "conv1-bn1-relu" in repr(fused) and "relu-maxpool" not in repr(fused)


def test_a_pool_that_is_watched_is_called():
    fused, seen = fuse(_Stem(nn.MaxPool2d(3, 2, 1))), []
    fused.maxpool.register_forward_hook(lambda module, args, result: seen.append(result.shape))
    with use_backend("reference"):
        fused(torch.randn(2, 3, 16, 16))
    assert seen == [(2, 4, 4, 4)]
