"""Checkpoints, copies and conversions: a fused model and a plain one may stand in for each other at any time."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from contract import assert_no_worse
from networks import DEVICE, SmallResNet, assert_same_step, pictures, quick_backends, small_resnet, step
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resnet_fused import fuse, report, unfuse, use_backend
from resnet_fused.fusion import swap
from resnet_fused.nn import BasicBlock, Bottleneck

torchvision = pytest.importorskip("torchvision")


def _saved(value: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


def _models(name: str) -> tuple[nn.Module, nn.Module]:
    if name.startswith("timm "):
        timm = pytest.importorskip("timm")
        return tuple(timm.create_model(name.removeprefix("timm "), num_classes=3) for _ in range(2))  # type: ignore
    make = SmallResNet if name == "small" else lambda: torchvision.models.get_model(name, num_classes=3)
    return make(), make()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "timm resnet18", "timm resnet26d", "mobilenet_v2", "small"])
def test_strict_load_goes_both_ways(name):
    """Keys, order, metadata and hooks of the state_dict are those of the plain model; so is what does not fit."""
    plain, other = _models(name)
    fused = fuse(other)
    state = plain.state_dict()
    assert list(fused.state_dict()) == list(state) and fused.state_dict()._metadata == state._metadata
    assert fused.load_state_dict(_saved(state, weights_only=True), strict=True) == plain.load_state_dict(state)
    unchanged = {k: v.clone() for k, v in state.items()}
    assert not plain.load_state_dict(_saved(fused.state_dict(), weights_only=True), strict=True).missing_keys
    assert all(torch.equal(v, unchanged[k]) for k, v in plain.state_dict().items())
    assert not fused.load_state_dict(OrderedDict(unchanged), assign=True).missing_keys
    broken = OrderedDict(list(state.items())[1:] + [("stranger", torch.zeros(1))])
    wrong = OrderedDict((k, v[:1] if v.dim() == 4 else v) for k, v in state.items())
    for bad in (broken, wrong):
        messages = []
        for model in (plain, fused):
            with pytest.raises(RuntimeError) as error:
                model.load_state_dict(bad)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_checkpoints_from_before_num_batches_tracked():
    """A version 1 batch norm has no counter: loading keeps the one that is there, strictly."""
    plain, fused = small_resnet(), fuse(small_resnet())
    old = OrderedDict((k, v) for k, v in plain.state_dict().items() if not k.endswith("num_batches_tracked"))
    for model in (plain, fused):
        step(model, pictures())
        result = model.load_state_dict(old)  # no metadata: version None
        assert not result.missing_keys and not result.unexpected_keys
    assert_same_step(dict(fused.state_dict()), dict(plain.state_dict()))
    assert fused.bn1.num_batches_tracked == 1
    block = BasicBlock(4, 4)
    block.load_state_dict({k: v for k, v in block.state_dict().items() if "num_batches" not in k})


@quick_backends
def test_own_blocks_load_torchvisions(backend):
    resnet = torchvision.models.resnet
    for ours, theirs, x in (
        (BasicBlock(4, 4), resnet.BasicBlock(4, 4), torch.randn(2, 4, 5, 5)),
        (Bottleneck(8, 2), resnet.Bottleneck(8, 2), torch.randn(2, 8, 5, 5)),
    ):
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert_same_step(step(ours, x, backend), step(theirs, x))
        theirs.load_state_dict(ours.state_dict(), strict=True)


@quick_backends
@pytest.mark.parametrize("use_buffers", [True, False])
def test_exponential_moving_averages(backend, use_buffers):
    """`AveragedModel` copies a fused model; the average trains and evaluates like that of a plain one."""
    plain, x = small_resnet(), pictures()
    results = []
    for model, name in ((plain, "auto"), (fuse(copy.deepcopy(plain)), backend)):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=use_buffers)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(3):
            step(model, x, name)
            optimizer.step()
            average.update_parameters(model)
        with torch.no_grad(), use_backend(name):
            y = average.eval()(x)
        results.append({"y": y, **average.state_dict()})
    assert_same_step(results[1], results[0], 1e-3)
    assert report(average.module).fused == report(model).fused


def test_timms_moving_average():
    timm = pytest.importorskip("timm")
    plain, x = small_resnet(), pictures()
    results = []
    for model in (plain, fuse(copy.deepcopy(plain))):
        average = timm.utils.ModelEmaV3(model, decay=0.5)
        step(model, x)
        average.update(model)
        results.append({"y": average.module.eval()(x).detach(), **average.module.state_dict()})
    assert_same_step(results[1], results[0])


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: _saved(m, weights_only=False),
}


@quick_backends
@pytest.mark.parametrize("how", COPIES)
def test_copies_train_on_as_the_original_does(backend, how):
    """In the middle of training, with an optimizer that is restored from its own checkpoint."""
    fused, x = fuse(small_resnet()), pictures()
    optimizer = torch.optim.SGD(fused.parameters(), 0.01, momentum=0.9)
    step(fused, x, backend)
    optimizer.step()
    twin = COPIES[how](fused)
    other = torch.optim.SGD(twin.parameters(), 0.01, momentum=0.9)
    other.load_state_dict(_saved(optimizer.state_dict(), weights_only=True))
    for model, opt in ((fused, optimizer), (twin, other)):
        fuse(model)  # what was pickled is as it was before it was fused
        for _ in range(2):
            step(model, x, backend)
            opt.step()
    assert_same_step(dict(twin.state_dict()), dict(fused.state_dict()), 0.0)
    assert report(fuse(twin)) == report(fused)
    assert type(unfuse(twin)) is SmallResNet


def test_weights_only_loading_names_what_it_wants():
    """A pickled model is code: `weights_only` refuses the plain one and the fused one alike."""
    for model in (small_resnet(), fuse(small_resnet())):
        with pytest.raises(pickle.UnpicklingError, match="[Ww]eights"):
            _saved(model, weights_only=True)


@quick_backends
@pytest.mark.parametrize("order", ["fuse first", "fuse last"])
def test_meta_device_and_to_empty(backend, order):
    plain, x = small_resnet(), pictures()
    with torch.device("meta"):
        model = SmallResNet()
    model = fuse(model) if order == "fuse first" else model
    assert order == "fuse last" or model(x.to("meta")).shape == (2, 5)
    model = model.to_empty(device=DEVICE)
    model.load_state_dict(plain.state_dict())
    assert_same_step(step(fuse(model), x, backend), step(plain, x))
    with torch.device("meta"):
        model = fuse(SmallResNet())
    model.load_state_dict(small_resnet().state_dict(), assign=True)
    assert all(p.device.type == DEVICE for p in model.parameters())
    assert report(model).skipped == [] and model(x).isfinite().all()


@quick_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_conversions(backend, dtype):
    """`.double()`, `.half()`, `.bfloat16()`, whichever came first; kernels that have no float64 say so."""
    plain, x = small_resnet(), pictures()
    results = []
    for convert_first in (True, False):
        model = copy.deepcopy(plain)
        model = fuse(model.to(dtype)) if convert_first else fuse(model).to(dtype)
        assert {p.dtype for p in model.state_dict().values()} == {dtype, torch.int64}
        assert report(model).skipped == []
        if dtype == torch.float64 and backend == "cuda":
            with pytest.raises(RuntimeError, match="cannot run here.*float64"):
                step(model, x.to(dtype), backend)
            return
        results.append(step(model, x.to(dtype), backend))
    assert_same_step(results[0], results[1], 0.0)
    expected = step(copy.deepcopy(plain).to(dtype), x.to(dtype))
    assert {k: v.dtype for k, v in results[0].items()} == {k: v.dtype for k, v in expected.items()}

    def some(results):
        return {name: results[name] for name in ("y", "bn1.running_mean", "layer1.bn2.running_var", "dfc.weight")}

    arguments = copy.deepcopy(plain).to(dtype), x.to(dtype)
    assert_no_worse(some(results[0]), lambda *arguments: some(step(*arguments)), arguments, norm=True)
    back = fuse(copy.deepcopy(plain).to(dtype)).to(torch.float32)
    assert step(back, x, backend)["y"].dtype == torch.float32


def test_moving_and_sharing_keep_the_fusion():
    fused = fuse(small_resnet())
    before = report(fused)
    for convert in (
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.cpu(),
        lambda m: m.share_memory(),
        lambda m: m.requires_grad_(False),
        lambda m: m.apply(lambda child: None),
    ):
        assert convert(fused) is fused and report(fused) == before and swap.is_fused(fused.layer1)
