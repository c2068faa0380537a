"""fuse and unfuse change classes and nothing else, and report says what they did."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from agreement import assert_same
from small_net import ALL_FUSED, Bottleneck, Net, picture
from torch import nn

from resnet_fused import nn as fused_nn
from resnet_fused import use_backend
from resnet_fused.fusion import fuse, plan_of, report, swap, unfuse

pytestmark = pytest.mark.usefixtures("one_thread")


def test_only_classes_change(plain):
    reference = copy.deepcopy(plain)
    objects = {name: (id(module), id(vars(module)["_parameters"])) for name, module in plain.named_modules()}
    parameters = {name: id(p) for name, p in plain.named_parameters()}
    buffers = {name: id(b) for name, b in plain.named_buffers()}
    state = plain.state_dict()
    classes = [type(module) for module in plain.modules()]
    attributes = [set(vars(module)) for module in plain.modules()]

    model = fuse(plain)

    assert model is plain
    assert {name: (id(module), id(vars(module)["_parameters"])) for name, module in model.named_modules()} == objects
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert {name: id(b) for name, b in model.named_buffers()} == buffers
    assert list(model.state_dict()) == list(state) and model.state_dict()._metadata == state._metadata
    assert isinstance(model, Net) and isinstance(model.layer[0], Bottleneck)
    assert type(model) is not Net and type(model).__qualname__ == "Net"
    assert type(model.layer[0]).__name__ == "Bottleneck" and type(model).__module__ == Net.__module__
    assert type(model.layer[0]) is type(model.layer[1])
    assert type(model.layer) is nn.Sequential and type(model.layer[0].downsample) is nn.Sequential
    assert report(model).fused == ALL_FUSED and report(model).skipped == []
    assert_same(reference, model, picture())

    assert unfuse(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert_same(reference, model, picture())


def test_fuse_and_unfuse_are_idempotent(fused):
    classes = [type(module) for module in fused.modules()]
    plan = plan_of(fused.layer[0])
    assert [type(module) for module in fuse(fused).modules()] == classes
    assert plan_of(fused.layer[0]) == plan
    unfuse(unfuse(fused))
    assert not any(swap.is_fused(module) for module in fused.modules())


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_kept(training):
    model = Net().train(training)
    model.bn1.train(not training)
    fuse(model)
    assert model.training is training and model.bn1.training is not training


def test_frozen_batch_norm_inside_a_training_block(plain, fused):
    for model in (plain, fused):
        model.train()
        model.layer[0].bn2.eval()
    x = picture()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(fused.layer[0].bn2.running_mean, plain.layer[0].bn2.running_mean)


@pytest.mark.parametrize("function", [fuse, unfuse, report])
@pytest.mark.parametrize("value", ["resnet50", None, torch.ones(1), nn.Module])
def test_what_is_not_a_module_is_a_type_error(function, value):
    with pytest.raises(
        TypeError,
        match=rf"{function.__name__}\(\): argument 'model'.*must be torch.nn.Module, not {type(value).__name__}",
    ):
        function(value)


def test_repr_and_report_read_well(fused):
    text = repr(fused.layer[1])
    assert text.startswith(
        "Bottleneck(\n  fused=Bottleneck: conv1-bn1-relu, conv2-bn2-relu, conv3-bn3-add-relu\n  (conv1): Conv2d("
    )
    fused.layer[1].scale = 0.5
    lines = str(report(fused)).splitlines()
    assert lines[0] == "3 modules fused, 1 of them in part, 0 left alone"
    assert lines[1].split() == "module what runs as one operation (a-b-c), or why not".split()
    assert lines[3] == "(model)  fused    conv1-bn1-relu"
    reason = "unit by unit, not as one block: a multiplication by 0.5 between `bn3` and the sum"
    row = " ".join(" ".join(lines[-2:]).split())
    assert row.endswith(f"layer.1 in part conv1-bn1-relu, conv2-bn2-relu, conv3-bn3; {reason}"), lines
    fused.layer[1].forward = lambda x: x
    assert str(report(fused)).splitlines()[0] == "2 modules fused, 1 left alone"


def test_report_of_a_model_that_was_not_fused(plain):
    result = report(plain)
    assert result.fused == []
    assert result.skipped[0] == ("", "not fused; fuse(model) would run conv1-bn1-relu")
    assert report(nn.Linear(2, 2)).skipped == [("", "none of its modules runs an nn.BatchNorm2d itself")]


def test_own_blocks_are_fused_already():
    model = nn.Sequential(fused_nn.BasicBlock(4, 4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    classes = [type(module) for module in model[0].modules()]
    result = report(fuse(model))
    assert result.fused == [("0", "resnet_fused.nn.BasicBlock"), ("1", "0-1")]
    assert [type(module) for module in model[0].modules()] == classes


def test_generated_forwards_are_left_alone():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    assert report(fuse(scripted)).fused == []


class Registry(nn.Module):
    """A base class that keeps a register of its subclasses."""

    names: list[str] = []

    def __init_subclass__(cls, *, tag, **kwargs):
        super().__init_subclass__(**kwargs)
        Registry.names.append(cls.__name__)


class Registered(Registry, tag="x"):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


def test_registries_of_subclasses_see_nothing():
    assert report(fuse(Registered())).fused == [("", "conv-bn")]
    assert Registry.names == ["Registered"]


def test_the_backend_of_frozen_models_names_the_others():
    fused = fuse(Net().eval())
    message = "runs frozen models only; choose one of 'auto', 'reference', 'triton', 'cuda', 'cpu', 'aten'"
    with use_backend("cudnn"), pytest.raises(RuntimeError, match=message):
        fused(torch.randn(2, 3, 16, 16))
