"""What is recognised as a residual block, however it is written, and which look-alikes are left alone."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_same, count_units
from torch import nn
from torch.utils.checkpoint import checkpoint

from resnet_fused.fusion import BlockPlan, Unit, fuse, plan_of, report


def conv3(a=4, b=4, **options):
    return nn.Conv2d(a, b, 3, padding=1, bias=False, **options)


class Block(nn.Module):
    """A basic block under other names; the look-alikes below differ from it in one thing each."""

    def __init__(self, channels=4):
        super().__init__()
        self.first, self.second = conv3(channels, channels), conv3(channels, channels)
        self.norm_a, self.norm_b = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        self.extra = self.make_extra()

    def make_extra(self):
        return nn.Identity()

    def forward(self, x):
        out = self.act(self.norm_a(self.first(x)))
        out = self.extra(self.norm_b(self.second(out)))
        return self.act(out + x)


BLOCK_UNITS = (Unit("first", "norm_a", "act", True), Unit("second", "norm_b", "act", True))


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
    assert plan.shortcut == Unit("proj", "proj_norm", None, False)
    assert plan.units[-1] == Unit("second", "norm_b", None, True)


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


# --- look-alikes that must be left alone ------------------------------------------------------------------------------


class PreActivation(Block):
    def forward(self, x):
        out = self.first(self.act(self.norm_a(x)))
        return x + self.second(self.act(self.norm_b(out)))


class ScaledSum(Block):
    def forward(self, x):
        out = self.norm_b(self.second(self.act(self.norm_a(self.first(x)))))
        return self.act((out + x) * 0.5)


class ScaledResidual(Block):
    def forward(self, x):
        out = self.norm_b(self.second(self.act(self.norm_a(self.first(x)))))
        return self.act(out * 0.2 + x)


class WeightedAdd(Block):
    def forward(self, x):
        out = self.norm_b(self.second(self.act(self.norm_a(self.first(x)))))
        return self.act(torch.add(out, x, alpha=2))


class ReluBeforeAdd(Block):
    def forward(self, x):
        out = self.norm_b(self.second(self.act(self.norm_a(self.first(x)))))
        return self.act(out) + x


class ReluBeforeAndAfterAdd(Block):
    def forward(self, x):
        out = self.norm_b(self.second(self.act(self.norm_a(self.first(x)))))
        return self.act(self.act(out) + x)


class NoReluBetween(Block):
    def forward(self, x):
        return self.act(self.norm_b(self.second(self.norm_a(self.first(x)))) + x)


class NoLastRelu(Block):
    def forward(self, x):
        return self.norm_b(self.second(self.act(self.norm_a(self.first(x))))) + x


class SharedConv(Block):
    def forward(self, x):
        out = self.norm_b(self.first(self.act(self.norm_a(self.first(x)))))
        return self.act(out + x)


class SharedNorm(Block):
    def forward(self, x):
        out = self.norm_a(self.second(self.act(self.norm_a(self.first(x)))))
        return self.act(out + x)


class SharedNormUnderTwoNames(Block):
    def __init__(self):
        super().__init__()
        self.norm_b = self.norm_a


class DropoutInside(Block):
    def make_extra(self):
        return nn.Dropout(0.5)


class FunctionalDropout(Block):
    def forward(self, x):
        out = F.dropout(self.act(self.norm_a(self.first(x))), 0.5, self.training)
        return self.act(self.norm_b(self.second(out)) + x)


class SqueezeExcite(Block):
    def make_extra(self):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())

    def forward(self, x):
        out = self.norm_b(self.second(self.act(self.norm_a(self.first(x)))))
        return self.act(out * self.extra(out) + x)


class Attention(nn.Module):
    def forward(self, x):
        return x.sigmoid()


class ExtraModule(Block):
    def make_extra(self):
        return Attention()


class OtherResidual(Block):
    def forward(self, x):
        y = self.act(self.norm_a(self.first(x)))
        return self.act(self.norm_b(self.second(y)) + y)


class SecondArgument(Block):
    def forward(self, x, y):
        out = self.norm_b(self.second(self.act(self.norm_a(self.first(x)))))
        return self.act(out + y)


class ReflectPadding(Block):
    def __init__(self):
        super().__init__()
        self.second = conv3(padding_mode="reflect")


class Leaky(Block):
    def __init__(self):
        super().__init__()
        self.act = nn.LeakyReLU()


class ReluSubclass(Block):
    def __init__(self):
        super().__init__()
        self.act = type("MyReLU", (nn.ReLU,), {"forward": lambda self, x: x.clamp(-1, 1)})()


class ConvSubclass(Block):
    def __init__(self):
        super().__init__()
        self.second = type("MyConv", (nn.Conv2d,), {"forward": lambda self, x: 2 * nn.Conv2d.forward(self, x)})(4, 4, 1)


class IntoItsInput(Block):
    def forward(self, x):
        out = self.norm_b(self.second(self.act(self.norm_a(self.first(x)))))
        x += out
        return self.act(x)


class ReturnsBoth(Block):
    def forward(self, x):
        out = self.norm_b(self.second(self.act(self.norm_a(self.first(x)))))
        return self.act(out + x), out


class SideBranch(Block):
    def forward(self, x):
        mid = self.act(self.norm_a(self.first(x)))
        torch.mean(x)
        return self.act(self.norm_b(self.second(mid)) + x)


class ThreeWaySum(Block):
    def forward(self, x):
        out = self.norm_b(self.second(self.act(self.norm_a(self.first(x)))))
        return self.act(out + x + x)


class Concatenation(Block):
    def forward(self, x):
        out = self.norm_b(self.second(self.act(self.norm_a(self.first(x)))))
        return self.act(torch.cat([out, x], 1))


class DifferentInTraining(Block):
    def forward(self, x):
        out = self.norm_b(self.second(self.act(self.norm_a(self.first(x)))))
        return self.act(out + x) if self.training else self.act(out + x) * 1.5


class DataDependent(Block):
    def forward(self, x):
        if x.mean() > 0:
            return x
        return super().forward(x)


class Counter(Block):
    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        self.count += 1
        return super().forward(x)


class BufferCounter(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        return super().forward(x)


class History(Block):
    def __init__(self):
        super().__init__()
        self.history = []

    def forward(self, x):
        self.history.append(x)
        return super().forward(x)


class StochasticDepth(Block):
    def forward(self, x):
        if self.training and random.random() < 0.5:
            return x
        return super().forward(x)


class TensorNoise(Block):
    def forward(self, x):
        return super().forward(x) + torch.rand(())


class FrozenPart(Block):
    def forward(self, x):
        with torch.no_grad():
            out = self.norm_a(self.first(x))
        return self.act(self.norm_b(self.second(self.act(out))) + x)


class FrozenInEvaluation(Block):
    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            return super().forward(x)


class FullPrecisionPart(Block):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class Checkpointed(Block):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class CheckpointedReentrant(Block):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=True)


class AsksForGradients(Block):
    def forward(self, x):
        y = super().forward(x)
        return y if torch.is_grad_enabled() else y * 2


class ReadsChild(Block):
    def forward(self, x):
        y = super().forward(x)
        return y if self.first.stride == (1, 1) else y * 2


class ReadsModeOfChild(Block):
    def forward(self, x):
        return x if self.norm_a.training else super().forward(x)


class ReadsMutable(Block):
    def __init__(self):
        super().__init__()
        self.options = {"skip": False}

    def forward(self, x):
        return x if self.options["skip"] else super().forward(x)


class TypeOfIntermediate(Block):
    def forward(self, x):
        y = super().forward(x)
        return y if isinstance(y, torch.Tensor) else y[0]


LOOK_ALIKES = [
    (PreActivation, "no relu follows the sum"),
    (ScaledSum, "the sum is multiplied by 0.5"),
    (ScaledResidual, "a multiplication by 0.2 between `norm_b` and the sum"),
    (WeightedAdd, "its branches meet in `add`"),
    (ReluBeforeAdd, "no relu follows the sum"),
    (ReluBeforeAndAfterAdd, "`act` (ReLU) between `norm_b` and the sum"),
    (NoReluBetween, "no relu between `norm_a` and `second`"),
    (NoLastRelu, "no relu follows the sum"),
    (SharedConv, "`first` is called 2 times"),
    (SharedNorm, "`norm_a` is called 2 times"),
    (SharedNormUnderTwoNames, "`norm_a` is called 2 times"),
    (DropoutInside, "`extra` (Dropout) between `norm_b` and the sum"),
    (FunctionalDropout, "`dropout` between `act` and `second`"),
    (SqueezeExcite, "`mul` joins branches before the sum"),
    (ExtraModule, "`extra` (Attention) between `norm_b` and the sum"),
    (OtherResidual, "is used more than once"),
    (SecondArgument, "its forward takes 2 inputs"),
    (ReflectPadding, "reflect"),
    (Leaky, "`act` (LeakyReLU)"),
    (ReluSubclass, "`act` (MyReLU)"),
    (ConvSubclass, "MyConv"),
    (IntoItsInput, "adds into its own input in place"),
    (ReturnsBoth, "returns more than one activation"),
    (SideBranch, "`mean` is computed beside the block"),
    (ThreeWaySum, "more than one sum"),
    (Concatenation, "its branches meet in `cat`"),
    (DifferentInTraining, "the sum is multiplied by 1.5"),
    (DataDependent, "cannot be traced"),
    (Counter, "sets the attribute `count`"),
    (BufferCounter, "`.add_()`"),
    (History, "reads the mutable attribute `history`"),
    (StochasticDepth, "draws random numbers"),
    (TensorNoise, "computes on tensors that do not come from its inputs"),
    (FrozenPart, "a context of its own"),
    (FrozenInEvaluation, "a context of its own"),
    (FullPrecisionPart, "a context of its own"),
    (Checkpointed, ("a context of its own", "computes on tensors")),
    (CheckpointedReentrant, "a context of its own"),
    (AsksForGradients, "depends on whether gradients or autocast are enabled"),
    (ReadsChild, "reads the attribute `first.stride`"),
    (ReadsModeOfChild, "reads `norm_a.training`"),
    (ReadsMutable, "reads the mutable attribute `options`"),
    (TypeOfIntermediate, "asks for the type of an intermediate value"),
]


@pytest.mark.parametrize(("make", "reason"), LOOK_ALIKES, ids=[make.__name__ for make, _ in LOOK_ALIKES])
def test_look_alike_is_left_alone(make, reason):
    plain = make()
    fused = fuse(copy.deepcopy(plain))
    assert type(fused) is make
    result = report(fused)
    assert result.fused == []
    assert [name for name, _ in result.skipped] == [""]
    text = result.skipped[0][1]
    assert any(r in text for r in ((reason,) if isinstance(reason, str) else reason)), text


@pytest.mark.parametrize("make", [make for make, _ in LOOK_ALIKES], ids=[make.__name__ for make, _ in LOOK_ALIKES])
def test_tracing_a_look_alike_has_no_side_effects(make):
    module = make()
    before = {name: copy.copy(value) for name, value in vars(module).items()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    python, torch_state, modes = (
        random.getstate(),
        torch.get_rng_state(),
        (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
    )
    report(fuse(module))
    assert {name: copy.copy(value) for name, value in vars(module).items()} == before
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), torch_state)
    assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == modes
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name])
