"""Whatever is changed in a fused model is noticed, and hooks fire as in the plain one."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from agreement import assert_same
from small_net import picture
from torch import nn

from resnet_fused.fusion import BlockPlan, SequencePlan, fuse, plan_of, report, swap
from resnet_fused.fusion.recognise import recognise

pytestmark = pytest.mark.usefixtures("one_thread")


def set_scale(model):
    model.layer[1].scale = 0.25


def set_drop_path(model):
    model.layer[0].drop_path = nn.Sequential(nn.SiLU())


def delete_and_set(model):
    del model.layer[0].drop_path
    model.layer[0].drop_path = nn.SiLU()


def pool_in_downsample(model):
    model.layer[0].downsample = nn.AvgPool2d(2)
    model.layer[0].conv3 = nn.Conv2d(4, 8, 1).double()
    model.layer[0].bn3 = nn.BatchNorm2d(8).double()
    model.layer[1] = nn.Conv2d(8, 16, 1).double()


def replace_inside_downsample(model):
    model.layer[0].downsample[1] = nn.Sequential(nn.BatchNorm2d(16), nn.Tanh()).double()


def append_to_downsample(model):
    model.layer[0].downsample.append(nn.Tanh())


def replace_batch_norm(model):
    model.layer[1]._modules["bn2"] = nn.BatchNorm2d(4, eps=0.5).double()


def replace_relu(model):
    model.layer[1].relu = nn.GELU()


def replace_head(model):
    model.fc = nn.Linear(16, 3).double()


def override_forward(model):
    model.layer[1].forward = lambda x: x * 2


def override_forward_of_downsample(model):
    model.layer[0].downsample.forward = lambda x: F.conv2d(x, torch.ones(16, 8, 1, 1, dtype=x.dtype), stride=2)


def checkpointing(model):
    model.grad_checkpointing = True


def register_scale(model):
    del model.layer[1].scale
    model.layer[1].register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))


def set_attributes_of_children(model):
    model.layer[0].bn1.momentum = 0.9
    model.layer[0].bn2.eps = 0.3
    model.layer[1].conv2.padding, model.layer[1].conv2.dilation = (2, 2), (2, 2)


# (what is done, where, what `report` then says, whether the units of the block are still fused)
CHANGES = [
    (set_scale, "layer.1", "a multiplication by 0.25 between `bn3` and the sum", True),
    (set_drop_path, "layer.0", "`drop_path.0` (SiLU) between `bn3` and the sum", True),
    (delete_and_set, "layer.0", "`drop_path` (SiLU) between `bn3` and the sum", True),
    (pool_in_downsample, None, None, True),
    (replace_inside_downsample, "layer.0", "`downsample.1.1` (Tanh) between `downsample.1.0` and the sum", True),
    (append_to_downsample, "layer.0", "`downsample.2` (Tanh) between `downsample.1` and the sum", True),
    (replace_batch_norm, None, None, True),
    (replace_relu, "layer.1", "`relu` (GELU) follows the sum", True),
    (replace_head, None, None, True),
    (override_forward, "layer.1", "its forward is overridden on the instance", False),
    (override_forward_of_downsample, "layer.0", "`downsample` (Sequential) between the input and the sum", True),
    (checkpointing, "", "its forward", False),
    (register_scale, "layer.1", "its forward cannot be traced", False),
    (set_attributes_of_children, None, None, True),
]


@pytest.mark.parametrize(
    ("change", "name", "reason", "units"), CHANGES, ids=[change.__name__ for change, *_ in CHANGES]
)
@pytest.mark.parametrize("before", ["fresh", "after a call"])
def test_changes_are_noticed(plain, fused, change, name, reason, units, before):
    if before == "after a call":
        for model in (plain, fused):
            model(torch.ones(2, 3, 16, 16, dtype=torch.float64))
    for model in (plain, fused):
        torch.manual_seed(1)
        change(model)
    assert_same(plain, fused, picture())
    skipped = dict(report(fused).skipped)
    if name is None:
        assert skipped == {}
    else:
        assert reason in skipped[name]
        assert isinstance(plan_of(fused.get_submodule(name)), SequencePlan) is units
        fuse(fused)
        assert swap.is_fused(fused.get_submodule(name)) is units
        assert_same(plain, fused, picture())


def test_a_change_that_is_taken_back_is_fused_again(plain, fused):
    fused.layer[1].scale = 2.0
    assert isinstance(plan_of(fused.layer[1]), SequencePlan)
    fused.layer[1].scale = 1.0
    assert isinstance(plan_of(fused.layer[1]), BlockPlan)
    assert_same(plain, fused, picture())


def test_sync_batch_norm_conversion_is_noticed(plain, fused):
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert isinstance(plan_of(converted.layer[1]), BlockPlan)
    assert type(swap.current(converted.layer[1]).units[0][1]) is nn.SyncBatchNorm
    assert_same(plain, converted, picture())  # in one process a SyncBatchNorm is a batch norm


def test_what_the_forward_does_not_read_asks_for_no_new_recognition(plain, fused, monkeypatch):
    recognised: list[nn.Module] = []

    def counting(module):
        recognised.append(module)
        return recognise(module)

    monkeypatch.setattr(swap, "recognise", counting)
    for model in (plain, fused):
        model.tag = model.layer[0].tag = "a name"
        model.layer[0].register_buffer("unused", torch.ones(1))
        model.layer[1].add = nn.Identity
        model.bn1.momentum = 0.2
        model.train().eval().float().double().to(memory_format=torch.channels_last).requires_grad_(False)
        model.load_state_dict(model.state_dict())
    x = picture()
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-12, atol=1e-12)
    assert recognised == []
    fused.layer[1].scale = 2.0  # which it does read
    fused(x)
    assert recognised == [fused.layer[1]]


@pytest.mark.parametrize(
    "path", ["conv1", "bn1", "layer.0", "layer.0.conv2", "layer.0.bn2", "layer.1.relu", "layer.0.downsample"]
)
def test_hooks_fire_as_in_the_plain_model(plain, fused, path):
    logs = []
    for model in (plain, fused):
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # full backward hooks refuse in-place changes, in the plain model, too
        log: list[torch.Tensor] = []
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda m, args, log=log: log.extend(a.detach().clone() for a in args))
        module.register_forward_hook(lambda m, args, y, log=log: log.append(y.detach().clone()))
        module.register_full_backward_hook(
            lambda m, dx, dy, log=log: log.extend(g.clone() for g in dy if g is not None)
        )
        logs.append(log)
    assert_same(plain, fused, picture())
    assert len(logs[0]) == len(logs[1]) > 0
    for expected, actual in zip(*logs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_global_hooks_see_every_module(plain, fused):
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(type(m)))
    try:
        fused(picture())
        count = len(seen)
        plain(picture())
    finally:
        handle.remove()
    assert count == len(seen) - count
