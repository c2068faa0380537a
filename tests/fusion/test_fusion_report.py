"""What `report` says is true, names what it speaks of, and hides nothing."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
import torchvision
from agreement import assert_same
from conv_with_norm import Bottleneck, Conv2d, Pyramid
from small_blocks import Block, conv3
from torch import nn

from resnet_fused.fusion import BlockPlan, fuse, plan_of, report


class OtherNorm(Block):
    def __init__(self, norm):
        super().__init__()
        self.norm_b = norm


NOT_FUSED = [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)]
NOT_FUSED += [type("LayerNorm2d", (nn.LayerNorm,), {})([4, 6, 6]), nn.LocalResponseNorm(2)]


@pytest.mark.parametrize("norm", NOT_FUSED, ids=lambda norm: type(norm).__name__)
def test_other_norms_are_listed(norm):
    model = nn.Sequential(Block(), OtherNorm(norm))
    result = report(fuse(model))
    assert ("1.norm_b", f"its norm is {type(norm).__name__}, which is not fused") in result.skipped
    assert dict(result.fused)["0"].startswith("BasicBlock") and dict(result.fused)["1"] == "first-norm_a-relu"


def test_other_norms_are_listed_once_wherever_they_are():
    other = "its norm is GroupNorm, which is not fused"
    holds = Conv2d(4, 4, 3, norm=nn.GroupNorm(2, 4))
    for model, names in (
        (Bottleneck(lambda channels: nn.GroupNorm(2, channels)), ["conv1", "conv2", "conv3", "shortcut"]),
        (Pyramid(lambda channels: nn.GroupNorm(2, channels)), ["lateral.0", "lateral.1", "shared"]),
        (nn.Sequential(nn.Sequential(conv3(), nn.ReLU(), nn.GroupNorm(2, 4))), ["0.2"]),
        (nn.Sequential(nn.Conv3d(4, 4, 3), nn.BatchNorm3d(4)), ["1"]),
        (holds, [""]),
    ):
        found = {name.removesuffix(".norm").removesuffix("norm"): why for name, why in report(fuse(model)).skipped}
        assert list(found) == names
        assert set(found.values()) <= {other, other.replace("GroupNorm", "BatchNorm3d")}
        assert len(report(model).skipped) == len(names)


def test_norms_of_what_is_no_picture_are_not_worth_a_word():
    model = nn.TransformerEncoderLayer(8, 2)
    assert report(fuse(model)).skipped == [("", "none of its modules runs an nn.BatchNorm2d itself")]


def test_a_model_with_batch_norms_is_never_said_to_have_none():
    scripted = torch.jit.script(nn.Sequential(conv3(), nn.BatchNorm2d(4)))
    for model, row in (
        (nn.Sequential(nn.BatchNorm2d(4)), ("0", "no convolution belongs to it alone, and no ReLU follows it")),
        (scripted, ("", "its forward is TorchScript's, which is not looked into")),
        (InList(), ("", "its forward draws random numbers")),
    ):
        assert report(fuse(model)).skipped == [row]


class InList(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([conv3(), nn.BatchNorm2d(4)])

    def forward(self, x):
        random.random()
        for layer in self.layers:
            x = layer(x)
        return x


class Deformable(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.roll(1, 2))


def deform(model, name):
    model.get_submodule(name).__class__ = Deformable
    return model


def test_a_convolution_of_another_kind_is_named_by_its_path():
    why = "`second` is a Deformable, a subclass of Conv2d with a forward of its own"
    result = report(fuse(nn.Sequential(deform(Block(), "second"))))
    assert result.skipped == [("0", f"unit by unit, not as one block: {why}"), ("0.second", why)]
    assert result.fused == [("0", "first-norm_a-relu, norm_b-add-relu")]


def test_the_table_stays_narrow_and_cuts_what_is_long():
    table = str(report(fuse(nn.Sequential(*(layer for _ in range(40) for layer in (conv3(), nn.BatchNorm2d(4)))))))
    assert max(map(len, table.splitlines())) <= 120 and "0-1, 2-3" in table and table.endswith(" ...")


def test_a_resnet50_fits_a_screen_and_says_first_what_was_fused():
    lines = str(report(fuse(torchvision.models.resnet50()))).splitlines()
    assert lines[0] == "17 modules fused, 0 left alone" and len(lines) < 15
    for names in ("(model)", "layer[1-4].0", "layer1.[1-2], layer2.[1-3],"):
        assert any(line.startswith(f"{names} ") for line in lines)


def test_who_is_watched_is_named_by_its_path():
    model = nn.Sequential(Block())
    model[0].second.register_forward_hook(lambda *args: None)
    assert report(fuse(model)).skipped == [
        ("0", "unit by unit, not as one block: `second`: a Conv2d has hooks"),
        ("0.second", "a Conv2d has hooks"),
    ]
    model = nn.Sequential(Block())
    model[0].norm_b.register_forward_hook(lambda *args: None)
    assert ("0.norm_b", "a BatchNorm2d has hooks") in report(fuse(model)).skipped


def test_a_block_is_written_with_its_sum():
    assert report(fuse(Block())).fused == [("", "BasicBlock: first-norm_a-relu, second-norm_b-add-relu")]


class ReluInTraining(Block):
    def forward(self, x):
        out = self.act(self.norm_a(self.first(x)))
        out = self.norm_b(self.second(out)) + x
        return self.act(out) if self.training else out


class DifferentReasons(Block):
    def forward(self, x):
        out = self.act(self.norm_a(self.first(x)))
        out = self.norm_b(self.second(out))
        return self.act(out * 0.5 + x) if self.training else out.sigmoid() + x


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (ReluInTraining, "in evaluation no relu follows the sum"),
        (
            DifferentReasons,
            "in training a multiplication by 0.5 between `norm_b` and the sum, in evaluation no relu follows the sum",
        ),
    ],
)
def test_it_is_said_which_mode_it_is_about(make, why):
    plain = make().double()
    fused = fuse(copy.deepcopy(plain))
    assert plan_of(fused) is None or not isinstance(plan_of(fused), BlockPlan)
    assert any(why in reason for _, reason in report(fused).skipped)
    assert_same(plain, fused, torch.randn(2, 4, 6, 6, dtype=torch.float64))


class Selects(Block):
    """What the branch holds is not its own, so that the projection is the only convolution that is seen."""

    def __init__(self):
        super().__init__()
        self.select = nn.Sequential(Block(), nn.GELU())
        self.project, self.norm_c = conv3(), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.act(self.select(x) + self.norm_c(self.project(x)))


def test_what_is_not_understood_is_named_before_anything_is_counted():
    reasons = dict(report(fuse(Selects())).skipped)
    assert reasons[""] == "unit by unit, not as one block: `select.0` (Block) between the input and `select.1`"


class CallsFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv3(), nn.BatchNorm2d(4)

    def forward(self, x):
        bn = self.norm
        return F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias)


def test_batch_norm_as_a_function_is_said_to_be_that():
    assert report(fuse(CallsFunction())).skipped == [
        ("", "its forward calls batch norm as a function, which is not fused")
    ]
