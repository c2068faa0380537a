"""Sums outside blocks, shortcuts that are more than a projection, and Sequentials that a chain crosses."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_freezes, assert_hook_sees_the_same, assert_same
from torch import nn

from resnet_fused import freeze, models, use_backend
from resnet_fused.fusion import BlockPlan, SequencePlan, fuse, plan_of, report


def conv(a=4, b=4, size=3, **options):
    return nn.Conv2d(a, b, size, padding=size // 2, bias=False, **options)


def picture(channels=4):
    return torch.randn(2, channels, 6, 6, dtype=torch.float64)


# --- shortcuts of blocks ----------------------------------------------------------------------------------------------


class PooledShortcut(nn.Module):
    """ResNet-D's block, with `pool` before the projection."""

    def __init__(self, pool, projection=True):
        super().__init__()
        self.conv1, self.bn1 = conv(4, 8 if projection else 4, stride=2), nn.BatchNorm2d(8 if projection else 4)
        self.conv2, self.bn2 = (conv(8, 8), nn.BatchNorm2d(8)) if projection else (conv(), nn.BatchNorm2d(4))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(pool, *([conv(4, 8, 1), nn.BatchNorm2d(8)] if projection else []))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.downsample(x)
        return self.relu(y)


POOLS = {
    "average": (lambda: nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False), True),
    "maximum": (lambda: nn.MaxPool2d(3, 2, 1), True),
    "average, no projection": (lambda: nn.AvgPool2d(2), False),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", POOLS)
def test_a_pool_before_the_projection_belongs_to_the_block(name, backend):
    pool, projection = POOLS[name]
    torch.manual_seed(0)
    plain = PooledShortcut(pool(), projection).double()
    fused = fuse(copy.deepcopy(plain))
    plan = plan_of(fused)
    assert isinstance(plan, BlockPlan) and plan.pools == ("downsample.0",)
    assert (plan.shortcut is not None) is projection and report(fused).skipped == []
    with use_backend(backend):
        assert_same(plain, fused, picture())


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_pool_is_kept_by_freeze(name, backend):
    pool, projection = POOLS[name]
    with use_backend(backend):
        frozen = assert_freezes(PooledShortcut(pool(), projection).double(), picture())
    assert {row.op for row in frozen.plan.layers} <= {"conv_fprop", "conv_join"}


def test_a_pool_that_is_watched_is_called_as_in_the_plain_model():
    plain = PooledShortcut(nn.AvgPool2d(2)).double()
    fused, seen = fuse(copy.deepcopy(plain)), []
    for model in (plain, fused):
        model.downsample[0].register_forward_hook(lambda m, args, y: seen.append(tuple(y.shape)))
    assert_same(plain, fused, picture())
    assert seen == [(2, 4, 3, 3)] * 6


def test_a_custom_pool_keeps_the_block_in_units():
    class Every(nn.Module):
        def forward(self, x):
            return x[:, :, ::2, ::2]

    plain = PooledShortcut(Every()).double()
    fused = fuse(copy.deepcopy(plain))
    assert isinstance(plan_of(fused), SequencePlan)
    units = "conv1-bn1-relu, conv2-bn2-add-relu, downsample.1-downsample.2"
    assert [(name, set(what.split(", "))) for name, what in report(fused).fused] == [("", set(units.split(", ")))]
    assert "`downsample.0` (Every) between the input and `downsample.1`" in report(fused).skipped[0][1]
    assert_same(plain, fused, picture())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_shortcuts_of_option_a_are_folded_around(backend):
    torch.manual_seed(0)
    model = models.cifar_resnet(8, shortcut="A").double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with use_backend(backend):
        frozen = freeze(model, x)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-9, atol=1e-9)
    assert {row.op for row in frozen.plan.layers} == {"conv_fprop"}


# --- sums outside blocks ----------------------------------------------------------------------------------------------


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), conv()
        self.norm_a, self.norm_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())


class Linear(Sum):
    """The linear bottleneck of MobileNetV2."""

    def forward(self, x):
        return x + self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))


class Gated(Sum):
    """Squeeze and excitation: the sum is not the batch norm's."""

    def forward(self, x):
        y = self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))
        return F.relu(y * self.gate(y) + x)


class IntoTheOther(Sum):
    """In place into the other summand: its memory, its dtype and shape, its errors."""

    def forward(self, x):
        y = self.norm_a(self.a(x)) * 2
        y += self.norm_b(self.b(x))
        return F.relu(y)


class SeenLater(Sum):
    """In place into a value that is looked at afterwards, through a view."""

    def forward(self, x):
        y = self.norm_a(self.a(x)) * 2
        view = y[:, :2]
        y += self.norm_b(self.b(x))
        return F.relu(y), view.clone()


class InputChanges(Sum):
    """The convolution's input is changed before the sum."""

    def forward(self, x):
        y = x.detach() * 1
        z = self.norm_b(self.b(y))
        y.mul_(3)
        return F.relu(z + y), y.clone()


class InputChangesThroughAView(Sum):
    def forward(self, x):
        y = x.detach() * 1
        half = y.view(2, 2, 2, 6, 6)
        z = self.norm_b(self.b(y))
        half[:, 0].zero_()
        return F.relu(z + x)


class TwoChains(Sum):
    """Either could take the sum."""

    def forward(self, x):
        return F.relu(self.norm_a(self.a(x)) + self.norm_b(self.b(x)))


class WithParameter(Sum):
    """Adds a parameter, which is no residual."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return F.relu(self.norm_a(self.a(x)) + self.offset)


class Broadcast(Sum):
    """The residual is broadcast."""

    def forward(self, x):
        mean = x.mean((2, 3), keepdim=True)
        return F.relu(self.norm_a(self.a(x)) + mean)


class Twice(Sum):
    """The sum of a value and itself."""

    def forward(self, x):
        y = self.norm_a(self.a(x))
        return F.relu(y + y)


SUMS = [
    (Linear, "a-norm_a-relu, b-norm_b-add"),
    (Gated, "a-norm_a-relu, b-norm_b"),
    (IntoTheOther, "a-norm_a, b-norm_b"),
    (SeenLater, "a-norm_a, b-norm_b"),
    (InputChanges, "b-norm_b"),
    (InputChangesThroughAView, "b-norm_b"),
    (TwoChains, "a-norm_a-add-relu, b-norm_b"),
    (WithParameter, "a-norm_a"),
    (Broadcast, "a-norm_a-add-relu"),
    (Twice, "a-norm_a"),
]


@pytest.mark.parametrize(("make", "units"), SUMS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_sum_is_part_of_the_chain_before_it_where_nobody_can_tell(make, units):
    torch.manual_seed(0)
    plain = make().double()
    fused = fuse(copy.deepcopy(plain))
    plan = plan_of(fused)
    assert isinstance(plan, SequencePlan)
    assert sorted(str(plan).split(", ")) == sorted(units.split(", "))
    if make is InputChanges:  # PyTorch refuses its backward
        with torch.no_grad():
            x = picture()
            for expected, actual in zip(plain(x), fused(x), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    elif make is InputChangesThroughAView:
        with torch.no_grad():
            x = picture()
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    else:
        assert_same(plain, fused, picture())


@pytest.mark.parametrize("make", [Linear, Gated, TwoChains])
def test_sums_of_units_on_the_fused_kernels(make):
    torch.manual_seed(0)
    plain = make().double()
    with use_backend("reference"):
        assert_same(plain, fuse(copy.deepcopy(plain)), picture())


@pytest.mark.parametrize("make", [Linear, Gated, IntoTheOther, TwoChains])
def test_freeze_folds_the_sum_with_the_convolution(make):
    torch.manual_seed(0)
    frozen = assert_freezes(make().double(), picture())
    folded = [row.fused for row in frozen.plan.layers if row.op == "conv_fprop"]
    assert len(folded) == 2 and sum("residual" in what for what in folded) == (make in (Linear, TwoChains))


@pytest.mark.parametrize("path", ["b", "norm_b", "a"])
def test_hooks_of_a_chain_with_a_sum_fire_in_order(path):
    torch.manual_seed(0)
    plain = Linear().double()
    assert_hook_sees_the_same(plain, fuse(copy.deepcopy(plain)), path, picture())


# --- Sequentials ------------------------------------------------------------------------------------------------------


class DeepStem(nn.Module):
    """Three convolutions in a Sequential, the batch norm and the pool behind the last of them outside."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(
            OrderedDict(a=conv(3, 4, stride=2), n=nn.BatchNorm2d(4), r=nn.ReLU(), last=nn.Sequential(conv()))
        )
        self.bn1, self.act1, self.maxpool = nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))


def test_a_deep_stem_is_one_plan():
    torch.manual_seed(0)
    plain, x = DeepStem().double(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    fused = fuse(copy.deepcopy(plain))
    assert report(fused).fused == [("", "conv1.a-conv1.n-relu, conv1.last.0-bn1-relu-maxpool")]
    assert list(fused.state_dict()) == list(plain.state_dict())
    for backend in ("auto", "reference"):
        with use_backend(backend):
            assert_same(copy.deepcopy(plain), fused, x)
        fused.load_state_dict(plain.state_dict())
    frozen = assert_freezes(plain, x)
    assert not any(isinstance(module, nn.Conv2d) for module in frozen.modules())  # no weight is kept twice


@pytest.mark.parametrize("path", ["conv1", "conv1.last", "conv1.last.0", "bn1"])
def test_an_opened_sequential_that_is_watched_is_called(path):
    plain, x = DeepStem().double(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    fused, counts = fuse(copy.deepcopy(plain)), []
    for model in (plain, fused):
        count: list[int] = []
        model.get_submodule(path).register_forward_hook(lambda m, args, y, count=count: count.append(1))
        counts.append(count)
    assert_same(plain, fused, x)
    assert len(counts[0]) == len(counts[1]) == 3


def test_a_change_in_an_opened_sequential_is_noticed():
    plain, x = DeepStem().double(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    fused = fuse(copy.deepcopy(plain))
    for model in (plain, fused):
        model.conv1.last.append(nn.Tanh())
    assert_same(plain, fused, x)
    assert "bn1-relu" in str(plan_of(fused)) and "last" not in str(plan_of(fused))
