"""Gradients of gradients, through every fused function: those of plain PyTorch, to any order."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from networks import AVAILABLE, DEVICE, QUICK, assert_same_step, pictures, small_resnet
from ranks import needs_gloo, sizes
from tiers import larger
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock

from resnet_fused import functional, fuse, ops, use_backend
from resnet_fused.functional.sync import choose_sync, sync_batch_norm_act, sync_batch_norm_act_max_pool

pytestmark = pytest.mark.usefixtures("one_thread")
FORCED = [name for name in QUICK if name != "auto"]


def _doubles(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, device=DEVICE, requires_grad=True)


def _running(channels: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.rand(2, channels, dtype=torch.float64, device=DEVICE) + 0.5)  # type: ignore[return-value]


# --- the functions, by differences, in float64 ------------------------------------------------------------------------


def _check(function, *inputs: Tensor) -> None:
    with use_backend("reference"):
        assert gradcheck(function, inputs) and gradgradcheck(function, inputs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize("residual", ["none", "another", "x"])
def test_batch_norm_act(training, act, residual):
    running, x = _running(3), _doubles(2, 3, 3, 2)

    def function(x, weight, bias, *other):
        added = {"none": None, "another": other[:1] and other[0], "x": x}[residual]
        own = (v.clone() for v in running)
        return functional.batch_norm_act(x, *own, weight, bias, added, training=training, act=act)

    _check(function, x, _doubles(3), _doubles(3), *([_doubles(2, 3, 3, 2)] if residual == "another" else []))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ["relu", None])
def test_convolutions(training, act):
    running, x, weight, residual = _running(4), _doubles(2, 3, 4, 3), _doubles(4, 3, 3, 3), _doubles(2, 4, 2, 2)
    how = {"stride": 2, "padding": 1, "act": act}

    def function(x, weight, scale, shift, residual):
        own = (v.clone() for v in running)
        return functional.conv_bn_act(x, weight, *own, scale, shift, residual, training=training, **how)

    _check(function, x, weight, _doubles(4), _doubles(4), residual)
    _check(lambda x, weight, bias: functional.conv_affine_act(x, weight, None, bias, **how), x, weight, _doubles(4))


@pytest.mark.parametrize("training", [True, False])
def test_the_stem_and_the_join(training):
    running, x = _running(3), _doubles(2, 3, 5, 4)
    _check(
        lambda x, w, b: functional.batch_norm_act_max_pool(x, *(v.clone() for v in running), w, b, training=training),
        *(x, _doubles(3), _doubles(3)),
    )
    for act in ("relu", None):
        _check(lambda x, other, act=act: functional.add_act(x, other, act=act), x, _doubles(2, 3, 5, 4))
        _check(lambda x, act=act: functional.add_act(x, x, act=act), x)


def test_the_third_order():
    """Of which PyTorch's own batch norm says that it has none."""

    def penalties(*inputs):
        y = functional.batch_norm_act(inputs[0], None, None, *inputs[1:], training=True)
        return torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)

    with use_backend("reference"):
        assert gradgradcheck(penalties, (_doubles(2, 3, 2, 2), _doubles(3), _doubles(3)))


# --- losses of gradients, against plain PyTorch -----------------------------------------------------------------------


def _penalised(module: nn.Module, x: Tensor, backend: str = "auto", call=None) -> dict[str, Tensor | None]:
    """A step on a loss in which gradients are: a constant gradient of the result (R1) and one that depends on it."""
    module.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with use_backend(backend):
        y = (call or module)(x)
        weights = torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype)
        (first,) = torch.autograd.grad((y * weights).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(y.float().square().mean(), x, create_graph=True)
        (first.float().pow(2).mean() + (second.float().norm() - 1) ** 2 + x.float().pow(3).mean()).backward()
    results = {"y": y.detach(), "first": first.detach(), "dx": x.grad}
    results |= {f"d{name}": p.grad for name, p in module.named_parameters()}
    return results | {name: buffer.clone() for name, buffer in module.named_buffers()}


def _zero_for_none(results: dict) -> dict:
    """A gradient that is zero everywhere may be None: of a last bias none depends on the value."""
    return {name: torch.zeros(()) if value is None or not value.any() else value for name, value in results.items()}


def _assert_same(actual: dict, expected: dict, tolerance: float) -> None:
    assert_same_step(_zero_for_none(actual), _zero_for_none(expected), tolerance)


@pytest.mark.parametrize("backend", QUICK)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_a_network(backend, training, layout):
    """Stem, identity, projection, running statistics moved once."""
    dtype = torch.float32 if backend == "cuda" else torch.float64
    plain = small_resnet().to(dtype).to(memory_format=layout).train(training)
    x = pictures(dtype=dtype).contiguous(memory_format=layout)
    actual = _penalised(fuse(copy.deepcopy(plain)), x, backend)
    _assert_same(actual, _penalised(plain, x), 1e-3 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.skipif("triton" not in AVAILABLE, reason="not available here")
def test_a_block_on_triton(training, projection):
    """And a convolution with bias, which is not part of a chain."""
    beside = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)) if projection else None
    unit = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    plain = nn.Sequential(BasicBlock(4, 4, downsample=beside), unit).to(DEVICE).train(training)
    x = torch.randn(2, 4, 3, 4, device=DEVICE)
    actual = _penalised(fuse(copy.deepcopy(plain)), x, "triton")
    _assert_same(actual, _penalised(plain, x), 1e-4)


@pytest.mark.parametrize("backend", FORCED)
@pytest.mark.parametrize("frozen", ["conv1", "bn1", "layer1", "layer2.0", "all", "batch norms"])
def test_frozen_parts(backend, frozen):
    plain = small_resnet()
    for name, module in plain.named_modules():
        if frozen == "batch norms" and isinstance(module, nn.BatchNorm2d):
            module.eval()
        if frozen in (name, "all"):
            module.requires_grad_(False)
    x = pictures()
    _assert_same(_penalised(fuse(copy.deepcopy(plain)), x, backend), _penalised(plain, x), 1e-3)


@pytest.mark.parametrize("backend", FORCED)
@pytest.mark.parametrize("how", ["hooks", "checkpoint"])
def test_saved_tensors_that_were_packed(backend, how):
    plain = small_resnet()
    x, fused = pictures(), fuse(copy.deepcopy(plain))

    def checkpointed(model: nn.Module, x: Tensor) -> Tensor:
        stem = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        return model.fc(model.avgpool(checkpoint(model.layer2, model.layer1(stem), use_reentrant=False)).flatten(1))

    if how == "checkpoint":
        actual = _penalised(fused, x, backend, lambda x: checkpointed(fused, x))
        expected = _penalised(plain, x, call=lambda x: checkpointed(plain, x))
    else:
        with saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
            actual = _penalised(fused, x, backend)
        expected = _penalised(plain, x)
    _assert_same(actual, expected, 1e-3)


@pytest.mark.parametrize("backend", FORCED)
def test_under_autocast(backend):
    plain, x = small_resnet(), pictures()
    results = []
    for model, name in ((fuse(copy.deepcopy(plain)), backend), (plain, "auto")):
        with torch.autocast(DEVICE, torch.bfloat16):
            results.append(_penalised(model, x, name))
    exact = _penalised(copy.deepcopy(plain).double(), x.double())
    assert {k: v is None or v.dtype for k, v in results[0].items()} == {
        k: v is None or v.dtype for k, v in results[1].items()
    }
    for name in ("first", "dx", "dconv1.weight", "dlayer2.0.conv2.weight"):
        ours, theirs = ((r[name].double() - exact[name]).norm() for r in results)
        assert ours <= 2 * theirs, name


@pytest.mark.parametrize("backend", FORCED)
@pytest.mark.parametrize("edited", ["conv1.weight", "bn1.weight", "bn1.bias", "bn2.bias", "x"])
def test_edits_in_place_before_backward(backend, edited):
    """What plain PyTorch saves is watched; a bias, which it does not save, may change, and gradients are as before."""
    outcomes = []
    for fused in (False, True):
        torch.manual_seed(0)
        module = BasicBlock(4, 4).to(DEVICE)
        module = fuse(module) if fused else module
        x = torch.randn(2, 4, 3, 4, device=DEVICE)
        x = x.requires_grad_() * 1.0
        with use_backend(backend if fused else "auto"):
            y = module(x)
        with torch.no_grad():
            (x if edited == "x" else module.get_parameter(edited)).add_(1)
        try:
            (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            gradient.square().sum().backward()
            outcomes.append(module.conv1.weight.grad)
        except RuntimeError as error:
            outcomes.append("modified by an inplace operation" in str(error))
    assert type(outcomes[0]) is type(outcomes[1])
    torch.testing.assert_close(*outcomes, rtol=1e-3, atol=1e-4)


def test_a_hessian_vector_product():
    weight = torch.randn(4, 3, 1, 1, device=DEVICE)

    def loss(x: Tensor) -> Tensor:
        return functional.conv_bn_act(x, weight, None, None, training=True).pow(3).sum()

    x, v = torch.randn(2, 3, 3, 3, device=DEVICE), torch.randn(2, 3, 3, 3, device=DEVICE)
    expected = torch.autograd.functional.hvp(loss, x, v)
    with use_backend("reference"):
        torch.testing.assert_close(torch.autograd.functional.hvp(loss, x, v), expected, rtol=1e-3, atol=1e-3)


# --- over processes ---------------------------------------------------------------------------------------------------


def _sync_step(rank, xs, residuals, vectors, backend, pools):
    x, residual = xs[rank].requires_grad_(), residuals[rank].requires_grad_()
    weight, bias, mean, var = (v.clone() for v in vectors)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with use_backend(backend):
        chosen = choose_sync("bn_act_max_pool" if pools else "bn_apply", x, (weight, bias, mean, var))
    shared = {"process_group": dist.group.WORLD, "backend": chosen}
    if pools:
        y = sync_batch_norm_act_max_pool(x, mean, var, weight, bias, **shared)
    else:
        y = sync_batch_norm_act(x, mean, var, weight, bias, residual, **shared)
    return _sync_penalty(y, x, leaves)


def _sync_penalty(y, x, leaves):
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (first.pow(2).sum() + x.pow(3).sum()).backward()
    return [first.detach(), *(t.grad for t in leaves)]


@needs_gloo
@pytest.mark.parametrize("backend", [larger("reference"), *["cuda"] * ops.available("cuda", "cpu")])
@pytest.mark.parametrize("pools", [larger(False), True])
@sizes
def test_synchronised(ranks, backend, pools, batches):
    """Of the penalty of all ranks together, as if their batches were one."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    x, residual = (torch.randn(sum(batches), 3, 4, 3, dtype=dtype) for _ in range(2))
    vectors = [*torch.randn(3, 3, dtype=dtype).unbind(), torch.rand(3, dtype=dtype) + 0.5]
    results = ranks.run(_sync_step, x.split(batches), residual.split(batches), vectors, backend, pools)
    weight, bias, mean, var = (v.clone() for v in vectors)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = F.batch_norm(x, mean, var, weight, bias, True)
    y = F.max_pool2d(F.relu(y), 3, 2, 1) if pools else F.relu(y + residual)
    expected = _sync_penalty(y, x, leaves)
    joined = [torch.cat([results[0][i], results[1][i]]) if i < 2 else results[0][i] + results[1][i] for i in range(4)]
    for actual, exact in zip(joined, expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-3, atol=1e-3 if dtype == torch.float32 else 1e-9)
