"""However a forward writes its sum, the result has the dtype, shape, values and errors that it has in plain PyTorch.

`a + b` promotes and broadcasts; `a += b` keeps the dtype and the shape of `a`, or raises. How exact the values are is
the matter of other tests: here a residual that was added wrongly is off by its own size.
"""

from __future__ import annotations

import contextlib
import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from agreement import tensors
from torch import nn
from torchvision.models import quantization, resnet

import resnet_fused
from resnet_fused import freeze, fuse, ops, unfuse, use_backend
from resnet_fused.fusion import BlockPlan, SequencePlan, plan_of

pytestmark = pytest.mark.usefixtures("one_thread")

SPELLINGS = {
    "y + x": lambda m, y, x: y + x,
    "x + y": lambda m, y, x: x + y,
    "y.add(x)": lambda m, y, x: y.add(x),
    "torch.add(x, y)": lambda m, y, x: torch.add(x, y),
    "operator.add(y, x)": lambda m, y, x: operator.add(y, x),
    "y.__add__(x)": lambda m, y, x: y.__add__(x),
    "x.__radd__(y)": lambda m, y, x: x.__radd__(y),
    "FloatFunctional.add": lambda m, y, x: m.functional.add(y, x),
    "y += x": lambda m, y, x: operator.iadd(y, x),
    "y.add_(x)": lambda m, y, x: y.add_(x),
    "y.__iadd__(x)": lambda m, y, x: y.__iadd__(x),
    "x += y": lambda m, y, x: operator.iadd(x, y),
    "x.add_(y)": lambda m, y, x: x.add_(y),
}
OTHERS = {  # more than a sum, or written as nobody can trace: whoever adds, the result is the same
    "FloatFunctional.add_relu": lambda m, y, x: m.functional.add_relu(y, x),
    "torch.add(y, x, alpha=1)": lambda m, y, x: torch.add(y, x, alpha=1),
    "torch.add(y, x, alpha=2)": lambda m, y, x: torch.add(y, x, alpha=2),
    "y.add_(x, alpha=2)": lambda m, y, x: y.add_(x, alpha=2),
    "y.add(other=x)": lambda m, y, x: y.add(other=x),
    "torch.Tensor.add(y, x)": lambda m, y, x: torch.Tensor.add(y, x),
    "sum": lambda m, y, x: sum([y, x]),
}
INTO_RESIDUAL = ("x += y", "x.add_(y)")


def conv(inputs, outputs, stride=1, size=3):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """A basic block; with `projected`, a projection to as many channels."""

    def __init__(self, add, inputs, outputs, stride=1, projected=None):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.down = nn.Sequential(conv(inputs, projected, 1, 1), nn.BatchNorm2d(projected)) if projected else None
        self.functional = nn.quantized.FloatFunctional()
        self.add = add

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.add(self, y, x if self.down is None else self.down(x)))


class Unit(nn.Module):
    """A sum behind a convolution that is no block, with whatever is made of the input."""

    def __init__(self, add, outputs, residual):
        super().__init__()
        self.conv, self.bn = conv(4, outputs), nn.BatchNorm2d(outputs)
        self.functional = nn.quantized.FloatFunctional()
        self.add, self.residual = add, residual

    def forward(self, x):
        residual = self.residual(x)
        return F.relu(self.add(self, self.bn(self.conv(x)), residual))


MODELS = {  # and the size of the input
    "equal": (lambda add: Block(add, 4, 4), (2, 4, 4, 4)),
    "equal, one channel": (lambda add: Block(add, 1, 1), (2, 1, 4, 4)),
    "equal, one pixel": (lambda add: Block(add, 4, 4), (2, 4, 1, 1)),
    "residual of one channel": (lambda add: Block(add, 1, 4), (2, 1, 4, 4)),
    "branch of one channel": (lambda add: Block(add, 4, 1), (2, 4, 4, 4)),
    "branch of one pixel": (lambda add: Block(add, 4, 4, stride=2), (2, 4, 2, 2)),
    "neither fits": (lambda add: Block(add, 4, 3), (2, 4, 4, 4)),
    "projection": (lambda add: Block(add, 4, 4, projected=4), (2, 4, 4, 4)),
    "projection to one channel": (lambda add: Block(add, 4, 4, projected=1), (2, 4, 4, 4)),
    "projection of a branch of one channel": (lambda add: Block(add, 4, 1, projected=4), (2, 4, 4, 4)),
    "unit": (lambda add: Unit(add, 4, lambda x: x * 2), (2, 4, 4, 4)),
    "unit, residual of one pixel": (lambda add: Unit(add, 4, lambda x: x.mean((2, 3), keepdim=True)), (2, 4, 4, 4)),
    "unit of one channel": (lambda add: Unit(add, 1, lambda x: x * 2), (2, 4, 4, 4)),
    "unit, expanded": (lambda add: Unit(add, 4, lambda x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1)), (2, 4, 4, 4)),
    "unit, float64": (lambda add: Unit(add, 4, lambda x: x.double() * 2), (2, 4, 4, 4)),
    "unit, bfloat16": (lambda add: Unit(add, 4, lambda x: x.bfloat16() * 2), (2, 4, 4, 4)),
    "unit, int64": (lambda add: Unit(add, 4, lambda x: (x * 4).long()), (2, 4, 4, 4)),
    "unit, complex": (lambda add: Unit(add, 4, lambda x: x.to(torch.complex64)), (2, 4, 4, 4)),
}


@contextlib.contextmanager
def nested_autocast():
    with torch.autocast("cpu", torch.float16), torch.autocast("cpu", torch.bfloat16):
        yield


@contextlib.contextmanager
def disabled_autocast():
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        yield


AUTOCASTS = {
    "fp32": contextlib.nullcontext,
    "bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "fp16": lambda: torch.autocast("cpu", torch.float16),
    "nested": nested_autocast,
    "disabled": disabled_autocast,
}


def outcome(model, x, backward=False):
    """What a call gives: its results, what it left of the input and, with `backward`, the gradient; or its error."""
    x = x.clone().requires_grad_(backward)
    own = x * 1  # not a leaf, which may be changed in place
    try:
        y = tensors(model(own))
        if backward:
            sum(t.sum() for t in y).backward()
    except RuntimeError as error:
        return type(error).__name__, str(error).splitlines()[0]
    return [*(t.detach() for t in (*y, own)), *([x.grad] if backward else [])]


def assert_same_outcome(expected, actual, tolerance=1e-3):
    if not isinstance(expected, list):
        assert actual == expected
        return
    assert isinstance(actual, list), actual
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    assert [t.shape for t in actual] == [t.shape for t in expected]
    for a, e in zip(actual, expected, strict=True):
        allowed = 0.1 if e.dtype in (torch.bfloat16, torch.float16) else tolerance
        torch.testing.assert_close(a, e, rtol=allowed, atol=allowed)


def check(plain, fused, x, autocast=contextlib.nullcontext, backend="auto"):
    """In training, in evaluation with and without gradients; both models begin in the same state, and end in one."""
    exact = autocast is contextlib.nullcontext
    for training, grad in ((True, True), (False, True), (False, False)):
        results = []
        for model, chosen in ((plain, "auto"), (fused, backend)):
            with use_backend(chosen), torch.set_grad_enabled(grad), autocast():
                results.append(outcome(model.train(training), x, backward=grad and exact))
        assert_same_outcome(*results, tolerance=1e-3 if exact else 0.1)


@pytest.mark.parametrize("spelling", [*SPELLINGS, *OTHERS])
@pytest.mark.parametrize("name", MODELS)
def test_the_sum_is_the_author_s(name, spelling):
    make, size = MODELS[name]
    plain, x = make({**SPELLINGS, **OTHERS}[spelling]), torch.randn(size)
    fused = fuse(copy.deepcopy(plain))
    for backend, autocast in (("auto", "fp32"), ("auto", "bf16"), ("reference", "fp32"), ("reference", "fp16")):
        check(plain, fused, x, AUTOCASTS[autocast], backend)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("spelling", [*SPELLINGS, *OTHERS])
@pytest.mark.parametrize("name", MODELS)
def test_the_frozen_sum_is_the_author_s(name, spelling, backend):
    make, size = MODELS[name]
    plain, x = make({**SPELLINGS, **OTHERS}[spelling]).eval(), torch.randn(size)
    with torch.no_grad():
        expected = outcome(plain, x)

    def frozen(x):
        with use_backend(backend):
            return freeze(plain, x.clone())(x)  # which runs the model, and so may change its example

    assert_same_outcome(expected, outcome(frozen, x))


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("equal", "y += x"),
        ("branch of one pixel", "y + x"),
        ("branch of one channel", "y += x"),
        ("projection", "x.add_(y)"),
        ("projection to one channel", "y + x"),
        ("unit", "x + y"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_on_the_kernels(backend, name, spelling):
    if not ops.available(backend, "cpu"):
        pytest.skip("not available here")
    make, size = MODELS[name]
    plain, x = make(SPELLINGS[spelling]), torch.randn(size)
    fused = fuse(copy.deepcopy(plain))
    for autocast in ("fp32", "bf16"):
        check(plain, fused, x, AUTOCASTS[autocast], backend)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_sum_is_fused_however_it_is_written(spelling):
    block = plan_of(fuse(Block(SPELLINGS[spelling], 4, 4, projected=4)))
    assert isinstance(block, BlockPlan) and str(block.units[-1]) == "conv2-bn2-add-relu"
    own = plan_of(fuse(Block(SPELLINGS[spelling], 4, 4)))
    assert isinstance(own, SequencePlan if spelling in INTO_RESIDUAL else BlockPlan)  # which would change the input
    unit = plan_of(fuse(Unit(SPELLINGS[spelling], 4, lambda x: x * 2)))
    assert ("add" in str(unit)) is (spelling not in INTO_RESIDUAL)


# --- blocks of resnet_fused.nn, and torchvision's ---------------------------------------------------------------------


BLOCKS = {
    "basic": ("BasicBlock", (16, 16), (2, 16, 4, 4)),
    "basic, stride 2": ("BasicBlock", (16, 16, 2), (2, 16, 2, 2)),
    "basic, one channel": ("BasicBlock", (16, 1), (2, 16, 4, 4)),
    "bottleneck": ("Bottleneck", (16, 4), (2, 16, 4, 4)),
    "bottleneck, stride 2": ("Bottleneck", (16, 4, 2), (2, 16, 2, 2)),
    "bottleneck, from one channel": ("Bottleneck", (1, 4), (2, 1, 4, 4)),
}


@pytest.mark.parametrize("autocast", AUTOCASTS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_add_as_torchvision_s_do(name, backend, autocast):
    cls, arguments, size = BLOCKS[name]
    plain, x = getattr(resnet, cls)(*arguments), torch.randn(size)
    native = getattr(resnet_fused.nn, cls)(*arguments)
    native.load_state_dict(plain.state_dict())
    for model in (fuse(copy.deepcopy(plain)), native):
        check(copy.deepcopy(plain), model, x, AUTOCASTS[autocast], backend)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_quantizable_blocks_add_by_a_module(backend):
    plain = quantization.resnet.QuantizableBasicBlock(4, 1)
    fused = fuse(copy.deepcopy(plain))
    assert isinstance(plan_of(fused), BlockPlan)
    for autocast in AUTOCASTS.values():
        check(plain, fused, torch.randn(2, 4, 4, 4), autocast, backend)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_shortcut_of_any_other_kind_is_added_in_place(backend):
    plain = resnet.BasicBlock(4, 4, downsample=nn.AvgPool2d(4))
    native = resnet_fused.nn.BasicBlock(4, 4, downsample=nn.AvgPool2d(4))
    native.load_state_dict(plain.state_dict())
    for autocast in AUTOCASTS.values():
        check(plain, native, torch.randn(2, 4, 4, 4), autocast, backend)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_modules_with_a_residual_add_out_of_place(backend):
    norm, unit = resnet_fused.nn.BatchNormAct2d(4), resnet_fused.nn.ConvBNAct2d(4, 4, 3)
    x = torch.randn(2, 4, 4, 4)
    for residual in (x.double(), x[:, :, :1, :1], x[:1], torch.randn(3, 2, 4, 4, 4)):
        for autocast in AUTOCASTS.values():
            with autocast():
                for module, plain in ((norm, norm), (unit, nn.Sequential(unit.conv, unit.bn))):
                    with use_backend(backend):
                        actual = module(x, residual)
                    expected = nn.BatchNorm2d.forward(plain, x) if plain is norm else plain(x)
                    assert_same_outcome([F.relu(expected + residual)], [actual], 0.1)


# --- frozen for one size, run on another ------------------------------------------------------------------------------


class Tail(nn.Module):
    """A bottleneck whose branch and shortcut have one size for one pixel, and two sizes for more."""

    def __init__(self, add, projected):
        super().__init__()
        self.conv1, self.bn1 = conv(16, 16, size=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = conv(16, 16, stride=2), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = conv(16, 16, size=1), nn.BatchNorm2d(16)
        self.down = nn.Sequential(conv(16, 16, 4, 1), nn.BatchNorm2d(16)) if projected else nn.Identity()
        self.add = add

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.add(self, self.bn3(self.conv3(y)), self.down(x)))


@pytest.mark.parametrize(
    ("projected", "spelling"),
    [(True, "y + x"), (True, "y += x"), (True, "x += y"), (False, "y + x"), (False, "y += x")],
)
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_a_frozen_tail_adds_as_the_model_does_in_every_size(backend, projected, spelling):
    dtype = torch.bfloat16 if backend == "triton" else torch.float32  # its chain is one of 16-bit tensor cores
    plain = nn.Sequential(Tail(SPELLINGS[spelling], projected), nn.ReLU()).eval().to(dtype)
    with torch.no_grad():
        with use_backend(backend):
            frozen = freeze(plain, torch.randn(2, 16, 1, 1, dtype=dtype))
        op = "conv_fprop" if backend == "auto" else "conv_join" if projected else "conv_chain"
        assert op in {row.op for row in frozen.plan.layers}
        for pixels in (1, 2, 4):
            x = torch.randn(2, 16, pixels, pixels, dtype=dtype)
            assert_same_outcome(outcome(plain, x), outcome(frozen, x))


def test_the_plan_of_a_frozen_model_says_why_a_residual_is_added_apart():
    frozen = freeze(Block(SPELLINGS["y + x"], 4, 1).eval(), torch.randn(2, 4, 4, 4))
    row = frozen.plan.layers[-1]
    assert (row.layer, row.fused) == ("conv2", "batch norm")
    assert row.reason == "the residual is [2, 4, 4, 4] torch.float32, the result [2, 1, 4, 4] torch.float32"


# --- values that somebody else sees -----------------------------------------------------------------------------------


class Keeps(Block):
    """Returns the shortcut beside the result."""

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        identity = x if self.down is None else self.down(x)
        return F.relu(self.add(self, y, identity)), identity


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("projected", [None, 4])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_shortcut_that_is_kept_is_changed_as_in_plain_pytorch(backend, projected, spelling):
    plain = Keeps(SPELLINGS[spelling], 4, 4, projected=projected)
    fused, x = fuse(copy.deepcopy(plain)), torch.randn(2, 4, 4, 4)
    for autocast in ("fp32", "bf16"):
        check(plain, fused, x, AUTOCASTS[autocast], backend)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("projected", [None, 4])
@pytest.mark.parametrize("path", ["bn2", "conv2"])
def test_a_hook_s_value_is_changed_as_in_plain_pytorch(path, projected, spelling):
    plain, x = Block(SPELLINGS[spelling], 4, 4, projected=projected), torch.randn(2, 4, 4, 4)
    fused, kept = fuse(copy.deepcopy(plain)), []
    for model in (plain, fused):
        model.get_submodule(path).register_forward_hook(lambda m, args, y: kept.append(y))
        model(x * 1)
    torch.testing.assert_close(kept[1], kept[0], rtol=1e-4, atol=1e-4)


class ByMode(Block):
    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.training:
            y += x
            return F.relu(y)
        return F.relu(y + x)


def test_training_and_evaluation_may_add_in_two_ways():
    for arguments, size in (((4, 4), (2, 4, 4, 4)), ((4, 1), (2, 4, 4, 4))):
        plain = ByMode(None, *arguments)
        fused = fuse(copy.deepcopy(plain))
        for autocast in AUTOCASTS.values():
            check(plain, fused, torch.randn(size), autocast)


class WithParameter(Block):
    """A sum that is none of two activations ends it."""

    def forward(self, x):
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)
        return F.relu(y + self.conv1.weight.mean())


def test_a_parameter_is_no_branch():
    plain = WithParameter(None, 4, 4)
    fused = fuse(copy.deepcopy(plain))
    assert str(plan_of(fused)) == "bn1-relu, conv2-bn2-add-relu"
    check(plain, fused, torch.randn(2, 4, 4, 4))
    assert type(unfuse(fused)) is WithParameter
