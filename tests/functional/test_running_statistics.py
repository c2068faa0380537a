"""Running statistics change unseen by autograd, as those of plain PyTorch's batch norm do."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from networks import AVAILABLE, DEVICE, QUICK, assert_same_step
from torch import nn
from torchvision.models.resnet import BasicBlock

from resnet_fused import functional, fuse, use_backend

pytestmark = pytest.mark.usefixtures("one_thread")


def _several_forwards(module: nn.Module, xs, backends, training) -> dict:
    total = 0
    for x, backend, mode in zip(xs, backends, training, strict=True):
        module.train(mode)
        with use_backend(backend):
            total = total + module(x).square().sum()
    total.backward()
    return {n: p.grad for n, p in module.named_parameters()} | {n: b.clone() for n, b in module.named_buffers()}


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("unit", ["block", "convolution", "stem"])
def test_plain_and_fused_forwards_before_one_backward(backend, unit):
    made = {
        "block": lambda: BasicBlock(4, 4),
        "convolution": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
        "stem": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
    }
    plain = made[unit]().to(DEVICE)
    xs = [torch.randn(2, 4, 6, 5, device=DEVICE) for _ in range(4)]
    for order in ((backend, "aten", backend, "aten"), ("aten", backend, backend, "aten")):
        fused, training = fuse(copy.deepcopy(plain)), (True,) * 4
        expected = _several_forwards(copy.deepcopy(plain), xs, order, training)
        assert_same_step(_several_forwards(fused, xs, order, training), expected, 1e-4)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("strided", [True, False])
def test_the_version_stays_whatever_the_strides(backend, strided):
    running = torch.ones(2, 3, device=DEVICE).unbind() if not strided else torch.ones(3, 2, device=DEVICE).unbind(1)
    before = [r.clone() for r in running]
    x = torch.randn(2, 3, 2, 2, device=DEVICE, requires_grad=True)
    with use_backend(backend):
        functional.batch_norm_act(x, *running, training=True)
    assert [r._version for r in running] == [0, 0]
    assert not any(map(torch.equal, running, before))


@pytest.mark.parametrize("backend", [b for b in QUICK if b != "auto"])
def test_a_backward_in_evaluation_has_the_statistics_of_its_forward(backend):
    """Also where a training forward came in between (plain PyTorch takes those behind it)."""
    plain, fused = BasicBlock(4, 4).to(DEVICE), fuse(BasicBlock(4, 4)).to(DEVICE)
    fused.load_state_dict(plain.state_dict())
    x, dy = (torch.randn(2, 4, 4, 3, device=DEVICE) for _ in range(2))
    gradients = []
    for model, between in ((plain, False), (fused, True)):
        with use_backend("auto" if model is plain else backend):
            y = model.eval()(x)
            if between:
                model.train()(3 * x + 5)
        gradients.append(torch.autograd.grad(y, list(model.parameters()), dy))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", QUICK)
def test_several_compiled_forwards_before_one_backward(backend):
    torch._dynamo.reset()
    plain = BasicBlock(4, 4).to(DEVICE)
    fused = fuse(copy.deepcopy(plain))
    xs = [torch.randn(2, 4, 4, 3, device=DEVICE) for _ in range(2)]
    expected = _several_forwards(plain, xs, ("auto",) * 2, (True,) * 2)
    actual = _several_forwards(torch.compile(fused, backend="aot_eager"), xs, (backend,) * 2, (True,) * 2)
    assert_same_step({n.replace("_orig_mod.", ""): v for n, v in actual.items()}, expected, 1e-4)


def test_statistics_made_in_inference_mode():
    """Which have no version."""
    for backend, inside in itertools.product(AVAILABLE, (True, False)):
        with torch.inference_mode():
            running = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
        with use_backend(backend), torch.inference_mode(inside):
            functional.batch_norm_act(torch.randn(2, 3, 2, 2, device=DEVICE) + 5, *running, training=True)
        assert (running[0] > 0.1).all()
