"""Modules that look like a residual block and are none, each with what `report` says of it."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from small_blocks import Block, conv3
from torch import nn
from torch.utils.checkpoint import checkpoint


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


class TypeOfIntermediate(Block):
    def forward(self, x):
        y = super().forward(x)
        return y if isinstance(y, torch.Tensor) else y[0]


# (what, why it is no block - None where its units are all there is to it -, the units that are fused)
LOOK_ALIKES = [
    (PreActivation, "no relu follows the sum", "norm_a-relu, first-norm_b-relu"),
    (ScaledSum, "the sum is multiplied by 0.5", "first-norm_a-relu, second-norm_b-add"),
    (ScaledResidual, "a multiplication by 0.2 between `norm_b` and the sum", "first-norm_a-relu, second-norm_b"),
    (WeightedAdd, None, "first-norm_a-relu, second-norm_b"),
    (ReluBeforeAdd, "no relu follows the sum", "first-norm_a-relu, second-norm_b-relu"),
    (ReluBeforeAndAfterAdd, "`act` (ReLU) between `norm_b` and the sum", "first-norm_a-relu, second-norm_b-relu"),
    (NoReluBetween, None, "first-norm_a, second-norm_b-add-relu"),
    (NoLastRelu, None, "first-norm_a-relu, second-norm_b-add"),
    (SharedConv, "`first` is called 2 times", "norm_a-relu, norm_b-add-relu"),
    (SharedNorm, "`norm_a` is called 2 times", None),
    (SharedNormUnderTwoNames, "`norm_a` is called 2 times", None),
    (DropoutInside, "`extra` (Dropout) between `norm_b` and the sum", "first-norm_a-relu, second-norm_b"),
    (FunctionalDropout, "`dropout` between `act` and `second`", "first-norm_a-relu, second-norm_b-add-relu"),
    (SqueezeExcite, "`mul` joins branches before the sum", "first-norm_a-relu, second-norm_b"),
    (ExtraModule, "`extra` (Attention) between `norm_b` and the sum", "first-norm_a-relu, second-norm_b"),
    (OtherResidual, None, "first-norm_a-relu, second-norm_b-add-relu"),
    (SecondArgument, None, "first-norm_a-relu, second-norm_b-add-relu"),
    (ReflectPadding, "reflect", "first-norm_a-relu, norm_b-add-relu"),
    (Leaky, "`act` (LeakyReLU)", "first-norm_a, second-norm_b-add"),
    (ReluSubclass, "`act` (MyReLU)", "first-norm_a, second-norm_b-add"),
    (ConvSubclass, "MyConv", "first-norm_a-relu, norm_b-add-relu"),
    (IntoItsInput, "adds into its own input in place", "first-norm_a-relu, second-norm_b"),
    (ReturnsBoth, "returns more than one activation", "first-norm_a-relu, second-norm_b"),
    (SideBranch, "`mean` is computed beside the block", "first-norm_a-relu, second-norm_b-add-relu"),
    (ThreeWaySum, "more than one sum", "first-norm_a-relu, second-norm_b-add"),
    (Concatenation, None, "first-norm_a-relu, second-norm_b"),
    (DifferentInTraining, "the sum is multiplied by 1.5", "first-norm_a-relu, second-norm_b-add-relu"),
    (DataDependent, "cannot be traced", None),
    (Counter, "sets the attribute `count`", None),
    (BufferCounter, "`.add_()`", "first-norm_a-relu, second-norm_b-add-relu"),
    (History, "changes what is in the attribute `history`", None),
    (StochasticDepth, "draws random numbers", None),
    (TensorNoise, "computes on tensors that do not come from its inputs", None),
    (FrozenPart, "a context of its own", None),
    (FrozenInEvaluation, "a context of its own", None),
    (FullPrecisionPart, "a context of its own", None),
    (Checkpointed, ("a context of its own", "computes on tensors"), None),
    (CheckpointedReentrant, "a context of its own", None),
    (AsksForGradients, "depends on whether gradients or autocast are enabled", None),
    (ReadsChild, "reads the attribute `first.stride`", None),
    (ReadsModeOfChild, "reads `norm_a.training`", None),
    (TypeOfIntermediate, "asks for the type of an intermediate value", None),
]
