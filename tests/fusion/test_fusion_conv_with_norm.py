"""Convolutions that hold their norm and call it, as detectron2's, are fused; so are the blocks built of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from agreement import (
    assert_freezes,
    assert_hook_sees_the_same,
    assert_one_graph,
    assert_same,
    assert_same_under_autocast,
    through_pickle,
)
from conv_with_norm import (
    Backbone,
    Bottleneck,
    Conv2d,
    ConvModule,
    FrozenBatchNorm2d,
    FrozenByTorch,
    NaiveSyncBatchNorm,
    NamedNorms,
    Pyramid,
)
from tiers import larger
from torch import nn

from resnet_fused import freeze, use_backend
from resnet_fused.fusion import BlockPlan, SequencePlan, fuse, plan_of, report, swap, unfuse
from resnet_fused.fusion.convs import ConvForm, conv_form

pytestmark = pytest.mark.usefixtures("one_thread")

NORMS = [nn.BatchNorm2d, FrozenBatchNorm2d, FrozenByTorch, NaiveSyncBatchNorm, nn.SyncBatchNorm]


def settled(model):
    """In float64, with statistics that are not those of a fresh model."""
    torch.manual_seed(0)
    for name, value in model.double().state_dict().items():
        if value.is_floating_point() and ("norm" in name or "bn" in name):
            nn.init.uniform_(value, 0.5, 1.5)
    return model


def picture(channels=3, size=16):
    return torch.randn(2, channels, size, size, dtype=torch.float64)


@pytest.mark.parametrize("norm", NORMS)
def test_residual_blocks_of_them_are_blocks_and_agree(norm):
    plain = settled(Backbone(norm))
    fused = fuse(copy.deepcopy(plain))
    blocks = [module for module in fused.modules() if isinstance(plan_of(module), BlockPlan)]
    assert len(blocks) == 4 and report(fused).skipped == []
    assert dict(report(fused).fused)["stem"] == "conv1-conv1.norm-relu"
    assert not any(swap.is_fused(module) for module in fused.modules() if isinstance(module, nn.Conv2d))
    assert_same(plain, fused, picture())
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in unfuse(fused).modules()] == [type(m) for m in plain.modules()]


@pytest.mark.parametrize("norm", NORMS)
def test_freeze_folds_them(norm):
    frozen = assert_freezes(settled(Backbone(norm)), picture(), ["conv_fprop"] * 13)
    assert list(frozen.network.parameters()) == []  # it keeps no weights that it does not run


def test_on_another_backend():
    plain = settled(Bottleneck(nn.BatchNorm2d))
    with use_backend("reference"):
        assert_same(plain, fuse(copy.deepcopy(plain)), picture(4, 6))


class OfList(nn.Module):
    def __init__(self, pyramid):
        super().__init__()
        self.pyramid = pyramid

    def forward(self, levels):
        return self.pyramid(dict(enumerate(levels)))


def test_alone_in_a_forward_that_is_not_understood_they_are_units():
    plain = settled(Pyramid())
    fused = fuse(copy.deepcopy(plain))
    assert report(fused).fused == [("lateral.0", "conv-norm"), ("lateral.1", "conv-norm"), ("shared", "conv-norm-relu")]
    assert report(fused).skipped == []
    levels = [picture(8, 6), picture(8, 3)]
    assert_same(OfList(plain), OfList(fused), levels)
    model, inputs = plain.eval(), picture(8, 6)
    assert_freezes(model.lateral[0], inputs, ["conv_fprop"])
    assert_freezes(model.last, picture(4, 6), ["-"])


OWN = {
    "gelu": (lambda: Conv2d(4, 4, 3, norm=nn.BatchNorm2d(4), activation=F.gelu), "conv-norm"),
    "leaky": (lambda: Conv2d(4, 4, 3, norm=nn.BatchNorm2d(4), activation=nn.LeakyReLU()), "conv-norm"),
    "clamped": (lambda: Clamped(4, 4, 3, bias=False, norm=nn.BatchNorm2d(4), activation=nn.ReLU()), "conv-norm"),
}


@pytest.mark.parametrize("name", OWN)
def test_what_else_such_a_convolution_does_is_kept(name):
    make, units = OWN[name]
    plain = settled(make())
    fused = fuse(copy.deepcopy(plain))
    assert report(fused).fused == [("", units)]
    assert_same(plain, fused, picture(4, 6))
    assert_freezes(plain, picture(4, 6), ["conv_fprop"])


class ThroughSuper(Conv2d):
    def forward(self, x):
        x = super(Conv2d, self).forward(x)
        return x if self.norm is None else self.norm(x)


class Scaled(Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class Standardised(Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        x = F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.norm is None else self.norm(x)


class OtherGeometry(Conv2d):
    def forward(self, x):
        return self.norm(F.conv2d(x, self.weight, self.bias, self.stride, 0))


class Clamped(Conv2d):
    def forward(self, x):
        return self.norm(super(Conv2d, self).forward(x.clamp(0, 1)))


class Doubled(Conv2d):
    def forward(self, x):
        return self.norm(F.conv2d(super(Conv2d, self).forward(x), self.weight, None, 1, 1))


FORMS = [
    (lambda: Conv2d(4, 4, 3), ()),
    (lambda: Conv2d(4, 4, 3, norm=nn.BatchNorm2d(4)), ("norm",)),
    (lambda: Conv2d(4, 4, 3, norm=nn.GroupNorm(2, 4), activation=nn.ReLU()), ("norm", "activation")),
    (lambda: Conv2d(4, 4, 3, activation=F.relu_), (None,)),
    (lambda: ThroughSuper(4, 4, 3, padding=1, norm=nn.BatchNorm2d(4)), ("norm",)),
    (lambda: Conv2d(4, 4, 3, norm=nn.BatchNorm2d(4), activation=F.gelu), "calls `norm` and goes on"),
    (lambda: Scaled(4, 4, 3), "a forward of its own"),
    (lambda: Standardised(4, 4, 3), "a forward of its own"),
    (lambda: OtherGeometry(4, 4, 3, padding=1, norm=nn.BatchNorm2d(4)), "a forward of its own"),
    (lambda: Clamped(4, 4, 3, norm=nn.BatchNorm2d(4)), "a forward of its own"),
    (lambda: Doubled(4, 4, 3, norm=nn.BatchNorm2d(4)), "a forward of its own"),
    (lambda: nn.Linear(4, 4), None),
]


@pytest.mark.parametrize(("make", "expected"), FORMS)
def test_what_a_convolution_is_is_seen_in_its_forward(make, expected):
    form = conv_form(make())
    if isinstance(expected, tuple):
        assert isinstance(form, ConvForm) and form.tail == expected
    else:
        assert form is None if expected is None else expected in form


@pytest.mark.parametrize("make", [Scaled, Standardised])
def test_others_are_left_alone_with_the_reason(make):
    plain = settled(Bottleneck(nn.BatchNorm2d))
    plain.conv2.__class__ = make
    fused = fuse(copy.deepcopy(plain))
    assert isinstance(plan_of(fused), SequencePlan) and len(plan_of(fused).all_units) == 3
    assert any("conv2" in reason and make.__name__ in reason for _, reason in report(fused).skipped)
    assert_same(plain, fused, picture(4, 6))


def test_who_watches_the_convolution_sees_the_norms_result():
    plain = settled(Bottleneck(nn.BatchNorm2d))
    assert_hook_sees_the_same(plain, fuse(copy.deepcopy(plain)), "conv2", picture(4, 6))


def replace_norm(model):
    model.conv1.norm = nn.BatchNorm2d(4, eps=0.5).double()


def drop_norm(model):
    model.conv1.norm = None


def add_activation(model):
    model.conv3.activation = F.gelu


def widen(model):
    model.conv2.stride = (2, 2)
    model.shortcut.stride = (2, 2)


@pytest.mark.parametrize("change", [replace_norm, drop_norm, add_activation, widen])
def test_changes_are_noticed(change):
    plain = settled(Bottleneck(nn.BatchNorm2d))
    fused = fuse(copy.deepcopy(plain))
    assert_same(plain, fused, picture(4, 6), steps=1)
    change(plain), change(fused)
    assert_same(plain, fused, picture(4, 6))


def test_empty_inputs_are_the_modules_own_affair():
    plain = Bottleneck(nn.SyncBatchNorm)
    fused = fuse(copy.deepcopy(plain))
    for model in (plain, fused):
        with pytest.raises(AssertionError, match="does not support empty inputs"):
            model(torch.empty(0, 4, 6, 6))
        assert model.eval()(torch.empty(0, 4, 6, 6)).shape == (0, 8, 6, 6)


class SkipsEmpty(Bottleneck):
    def forward(self, x):
        return super().forward(x) if x.shape[0] > 0 else x


def test_a_forward_may_ask_whether_its_input_is_empty():
    plain = settled(SkipsEmpty(nn.BatchNorm2d))
    fused = fuse(copy.deepcopy(plain))
    assert isinstance(plan_of(fused), BlockPlan)
    assert fused(torch.empty(0, 4, 6, 6).double()).shape == (0, 4, 6, 6)
    assert_same(plain, fused, picture(4, 6))
    model = plain.eval()
    frozen = freeze(model, picture(4, 6))
    assert frozen(torch.empty(0, 4, 6, 6).double()).shape == (0, 4, 6, 6)


def test_a_norm_that_asks_for_the_processes_is_looked_at_again_when_there_are_more(monkeypatch):
    fused = fuse(settled(Bottleneck(NaiveSyncBatchNorm)))
    x = picture(4, 6)
    fused(x)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *args: 2)
    with pytest.raises(NotImplementedError, match="all processes"):
        fused(x)
    assert plan_of(fused) is None


@pytest.mark.parametrize("training", [True, larger(False)])
def test_compiles_in_one_graph(training):
    plain = settled(Bottleneck(nn.BatchNorm2d)).train(training)
    assert_one_graph(plain, fuse(copy.deepcopy(plain)), picture(4, 6))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: fuse(through_pickle(m))])
def test_copies(duplicate):
    plain = settled(nn.Sequential(Bottleneck(nn.BatchNorm2d), Conv2d(8, 4, 1, norm=nn.BatchNorm2d(4))))
    twin = duplicate(fuse(copy.deepcopy(plain)))
    assert [name for name, _ in report(twin).fused] == ["", "0"]
    assert_same(plain, twin, picture(4, 6))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
@pytest.mark.parametrize("training", [True, False])
def test_the_dtype_under_autocast_is_that_of_the_plain_model(norm, training):
    plain = Bottleneck(norm).train(training)
    assert_same_under_autocast(plain, fuse(copy.deepcopy(plain)), torch.randn(2, 4, 6, 6))


NEIGHBOURS = [
    (lambda: ConvModule(4, 4), "conv-bn-relu"),
    (lambda: ConvModule(4, 4, act=False), "conv-bn"),
    (lambda: ConvModule(4, 4, order=("act", "conv", "norm")), "conv-bn"),
    (lambda: ConvModule(4, 4, order=("norm", "act", "conv")), "bn-relu"),
    (NamedNorms, "BasicBlock: conv1-bn1-relu, conv2-bn2-add-relu"),
]


@pytest.mark.parametrize(("make", "expected"), NEIGHBOURS)
def test_containers_that_find_their_norm_by_name(make, expected):
    plain = settled(make())
    fused = fuse(copy.deepcopy(plain))
    assert report(fused).fused == [("", expected)] and report(fused).skipped == []
    assert_same(plain, fused, picture(4, 6))


def test_a_container_that_asks_for_the_mode_of_its_norm_and_acts_on_it_is_not_understood():
    model = ConvModule(4, 4)
    model.efficient_conv_bn_eval_forward = F.relu
    assert "reads `bn.training`" in report(fuse(model)).skipped[0][1]
