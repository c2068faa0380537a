"""A residual block is recognised however it is written, and agrees with the plain one."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_same, count_units
from small_blocks import Block, conv3
from torch import nn

from resnet_fused.fusion import BlockPlan, Unit, fuse, plan_of, report
from resnet_fused.nn.sums import PLUS, Sum

BLOCK_UNITS = (Unit("first", "norm_a", "act", "relu"), Unit("second", "norm_b", "act", "relu", add=PLUS))


# --- blocks that must be recognised, however they are written ---------------------------------------------------------


class Functional(Block):
    def forward(self, x):
        y = F.relu(self.norm_a(self.first(x)), inplace=True)
        y = self.norm_b(self.second(y))
        return torch.relu(torch.add(x, y))


class InPlace(Block):
    def forward(self, x):
        y = self.norm_a(self.first(x)).relu_()
        y = self.norm_b(self.second(y))
        y += x
        return y.relu_()


class Method(Block):
    def forward(self, x):
        y = F.relu_(self.norm_a(self.first(x)))
        return self.norm_b(self.second(y)).add_(x).relu()


class OptionalArgument(Block):
    def forward(self, x, scale=None):
        out = self.norm_b(self.second(self.act(self.norm_a(self.first(x)))))
        if scale is not None:
            out = out * scale
        return self.act(x + out)


class TwoModuleShortcut(Block):
    def __init__(self):
        super().__init__()
        self.proj, self.proj_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        short = self.proj_norm(self.proj(x))
        out = self.norm_b(self.second(self.act(self.norm_a(self.first(x)))))
        short += out
        return F.relu(short)


class InSequentials(nn.Module):
    """The style of pytorch-cifar: the branch and the shortcut are Sequentials, an identity is an empty one."""

    def __init__(self, stride):
        super().__init__()
        out = 4 * stride
        self.residual = nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(True),
            conv3(4, out, stride=stride), nn.BatchNorm2d(out), nn.ReLU(True),
            nn.Sequential(nn.Conv2d(out, out, 1), nn.BatchNorm2d(out)),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(4, out, 1, stride=stride), nn.BatchNorm2d(out))

    def forward(self, x):
        return F.relu(self.residual(x) + self.shortcut(x))


class ConvListBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4), nn.Conv2d(8, 4, 1)]
        )
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(8, momentum=None), nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(4)]
        )

    def forward(self, x):
        y = x
        for k, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            if k < 2:
                y = F.relu(y)
        return F.relu(x + y)


BLOCKS = [
    (Block, "BasicBlock", 2),
    (Functional, "BasicBlock", 2),
    (InPlace, "BasicBlock", 2),
    (Method, "BasicBlock", 2),
    (OptionalArgument, "BasicBlock", 2),
    (TwoModuleShortcut, "BasicBlock", 3),
    (lambda: InSequentials(1), "Bottleneck", 3),
    (lambda: InSequentials(2), "Bottleneck", 4),
    (ConvListBlock, "Bottleneck", 3),
]


@pytest.mark.parametrize(("make", "kind", "units"), BLOCKS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_block_is_recognised_and_agrees(make, kind, units, memory_format, monkeypatch):
    calls = count_units(monkeypatch)
    torch.manual_seed(0)
    plain = make().double().to(memory_format=memory_format)
    fused = fuse(copy.deepcopy(plain))
    plan = plan_of(fused)
    assert isinstance(plan, BlockPlan)
    assert plan.kind == kind and len(plan.all_units) == units
    assert report(fused).skipped == []
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64).to(memory_format=memory_format)
    assert_same(plain, fused, x)
    assert len(calls) == 3 * units  # two steps of training and one evaluation


def test_plan_names_the_modules():
    plan = plan_of(fuse(Block()))
    assert plan == BlockPlan("BasicBlock", BLOCK_UNITS, None, ("extra",))
    plan = plan_of(fuse(TwoModuleShortcut()))
    assert plan.shortcut == Unit("proj", "proj_norm", None, None)
    assert plan.units[-1] == Unit("second", "norm_b", None, "relu", add=Sum(operator.iadd, branch_first=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_error_is_within_twice_that_of_plain_pytorch(dtype, training):
    torch.manual_seed(0)
    judge = Block(16).double().train(training)
    x = torch.randn(4, 16, 8, 8, dtype=torch.float64).to(dtype).double()
    plain = copy.deepcopy(judge).to(dtype)
    judge.load_state_dict(plain.state_dict())  # the judge starts from the rounded weights
    fused = fuse(copy.deepcopy(plain))
    expected = judge(x)
    errors = [(m(x.to(dtype)).double() - expected).abs().max() for m in (plain, fused)]
    floor = torch.finfo(dtype).eps
    assert errors[1] <= 2 * errors[0] + floor
