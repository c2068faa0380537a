"""SyncBatchNorm: statistics, gradients and errors against one process with all batches, and its conversion.

Two processes of a gloo group on the CPU. The oracle is plain PyTorch on the batches put one behind the other.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from contract import assert_no_worse
from ranks import WORLD, needs_gloo, sizes
from torch import nn

import resnet_fused
from resnet_fused import ops, use_backend
from resnet_fused.contract import longest_sum
from resnet_fused.functional.sync import _statistics, choose_sync, sync_batch_norm_act, sync_batch_norm_act_max_pool
from resnet_fused.nn import BatchNormAct2d, SyncBatchNormAct2d, call

pytestmark = needs_gloo
BACKENDS = [b for b in ("reference", "triton", "cuda") if ops.available(b, "cpu")]


def _sync_step(rank, parts, vectors, options):
    """One step on this rank's part: output, gradients, running statistics."""
    x, residual, dy = (None if part is None else part[rank] for part in parts)
    weight, bias, mean, var = (v.clone() for v in vectors)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    with use_backend(options["backend"]):
        pools = options["act"] == "pool"
        chosen = choose_sync("bn_act_max_pool" if pools else "bn_apply", x, (weight, bias, mean, var))
    shared = {"process_group": dist.group.WORLD, "backend": chosen}
    if pools:
        y = sync_batch_norm_act_max_pool(x, mean, var, weight, bias, **shared)
    else:
        y = sync_batch_norm_act(x, mean, var, weight, bias, residual, act=options["act"], **shared)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in leaves), mean, var]


def _plain_step(x, residual, dy, vectors, act):
    weight, bias, mean, var = vectors
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    y = F.batch_norm(x, mean, var, weight, bias, True)
    y = y if residual is None else y + residual
    y = F.relu(y) if act else y
    y = F.max_pool2d(y, 3, 2, 1) if act == "pool" else y
    y.backward(dy)
    names = ["y", "dx", "dweight", "dbias", *(["dresidual"] if residual is not None else []), "mean", "var"]
    return dict(zip(names, [y.detach(), *(t.grad for t in leaves), mean, var], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_rank_sends_is_of_its_whole_batch_however_many_rows_that_took(backend):
    """A trend along the pixels, so that the rows of `bn_stats` have means of their own."""
    x = torch.randn(4, 3, 12, 16) + torch.linspace(-4, 4, 4 * 192).view(4, 1, 12, 16) + 100
    assert resnet_fused.dispatch.partial_rows(4 * 192, 3) > 1
    count, mean, m2 = _statistics(x, backend).split((1, 3, 3))
    up = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(count, torch.tensor([768.0], dtype=torch.float64))
    torch.testing.assert_close(mean, up.mean(1), rtol=1e-8, atol=0)
    torch.testing.assert_close(m2, up.var(1, correction=0) * 768, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", ["relu", "residual", "plain", "pool"])
@sizes
def test_statistics_are_those_of_all_batches(ranks, backend, dtype, layout, case, batches):
    def activation(*size):
        full = torch.randn(sum(batches), 6, *size).to(dtype).contiguous(memory_format=layout)
        return full, [part.contiguous(memory_format=layout) for part in full.split(batches)]

    (x, xs), (dy, dys) = activation(5, 3), activation(*((3, 2) if case == "pool" else (5, 3)))
    residual, residuals = activation(5, 3) if case == "residual" else (None, None)
    vectors = [torch.randn(6), torch.randn(6), torch.randn(6), torch.rand(6) + 0.5]
    act = {"plain": None, "pool": "pool"}.get(case, "relu")
    results = ranks.run(_sync_step, (xs, residuals, dys), vectors, {"backend": backend, "act": act})
    names = ["y", "dx", "dweight", "dbias", *(["dresidual"] if residual is not None else []), "mean", "var"]
    joined = {}
    for name, first, second in zip(names, *results, strict=True):
        if name in ("mean", "var"):
            assert torch.equal(first, second), f"{name}: the ranks disagree"
            joined[name] = first
        else:  # parameters' gradients are each rank's own; DDP adds them up
            joined[name] = first + second if name in ("dweight", "dbias") else torch.cat([first, second])
    assert_no_worse(joined, _plain_step, (x, residual, dy, vectors, act), addends=longest_sum(x))


@pytest.mark.parametrize("backend", BACKENDS)
@sizes
def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(ranks, backend, batches):
    means = torch.tensor([100.0, -100.0, 1e4, -1e4, 3e4, 0.0]).view(6, 1, 1)
    x = means + torch.randn(sum(batches), 6, 5, 3)
    vectors = [torch.ones(6), torch.zeros(6), torch.zeros(6), torch.ones(6)]
    parts = (x.split(batches), None, torch.zeros_like(x).split(batches))
    results = ranks.run(_sync_step, parts, vectors, {"backend": backend, "act": None})

    def plain(x, vectors):
        step = _plain_step(x, None, torch.zeros_like(x), vectors, None)
        return {name: step[name] for name in ("mean", "var")}

    for *_, mean, var in results:
        assert_no_worse({"mean": mean, "var": var}, plain, (x, vectors), addends=longest_sum(x))


def _raises(rank, batches, shape):
    bn = nn.SyncBatchNorm(3)
    try:
        call.batch_norm_act(torch.randn(batches[rank], *shape), bn, None, "relu")
    except ValueError as error:
        return str(error)
    return [bn.running_mean, bn.running_var]


def test_one_value_in_all_batches_is_an_error_on_every_rank(ranks):
    for message in ranks.run(_raises, (1, 0), (3, 1, 1)):
        assert message.startswith("Expected more than 1 value per channel when training")


def test_one_value_on_every_rank_is_enough(ranks):
    first, second = ranks.run(_raises, (1, 1), (3, 1, 1))
    assert torch.equal(first[1], second[1]) and first[1].isfinite().all()


def test_nothing_on_any_rank_leaves_the_statistics_alone(ranks):
    bn = nn.BatchNorm2d(3)
    bn(torch.empty(0, 3, 2, 2))
    for mean, var in ranks.run(_raises, (0, 0), (3, 2, 2)):
        assert torch.equal(mean, bn.running_mean) and torch.equal(var, bn.running_var)


def _unit_step(rank, xs, conv, backend):
    bn, x = nn.SyncBatchNorm(4), xs[rank].requires_grad_()
    with use_backend(backend):
        y = call.conv_bn_act(x, conv, bn, None, residual=x)
    (y * y).sum().backward()
    return [y.detach(), x.grad, conv.weight.grad, bn.running_var]


@pytest.mark.parametrize("backend", BACKENDS)
@sizes
def test_a_unit_on_every_backend(ranks, backend, batches):
    x, conv = torch.randn(sum(batches), 4, 6, 5), nn.Conv2d(4, 4, 3, padding=1, bias=False)
    first, second = ranks.run(_unit_step, x.split(batches), conv, backend)

    def plain(x, conv, bn):
        y = F.relu(bn(conv(x)) + x)
        (y * y).sum().backward()
        return [y, x.grad, conv.weight.grad, bn.running_var]

    joined = [torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]), first[2] + second[2], first[3]]
    assert_no_worse(joined, plain, (x.requires_grad_(), conv, nn.BatchNorm2d(4)))


def _beside_pytorchs(rank, xs, residuals, backend):
    """Our step and that of `nn.SyncBatchNorm`, on this rank's GPU."""
    x, residual = xs[rank].cuda(rank), residuals[rank].cuda(rank)
    results = []
    for ours in (True, False):
        bn, leaf = SyncBatchNormAct2d(6).cuda(rank), x.clone().requires_grad_()
        with use_backend(backend):
            y = bn(leaf, residual) if ours else F.relu(nn.SyncBatchNorm.forward(bn, leaf) + residual)
        (y * y).sum().backward()
        results.append([t.cpu() for t in (y.detach(), leaf.grad, bn.weight.grad, bn.bias.grad, bn.running_var)])
    return results


@pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
@sizes
def test_on_gpus_it_is_pytorchs_own_sync_batch_norm(ranks, backend, batches):
    if backend != "auto" and not ops.available(backend, "cuda"):
        pytest.skip(str(ops.unavailable(backend, "cuda")))
    xs, residuals = (torch.randn(sum(batches), 6, 5, 3).split(batches) for _ in range(2))
    for ours, theirs in ranks.run(_beside_pytorchs, xs, residuals, backend):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [nn.SyncBatchNorm, SyncBatchNormAct2d])
def test_where_the_plan_has_native_pytorch_its_own_forward_runs(monkeypatch, cls):
    """As on a GPU under "auto" before any kernel of ours is the default."""
    called = []
    monkeypatch.setattr(call, "sync_group", lambda bn: "a group")
    monkeypatch.setattr(call, "choose_sync", lambda *_: None)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, x: called.append(self) or x - 1)
    bn, x, residual = cls(3), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(call.batch_norm_act(x, bn, residual, "relu"), F.relu(x - 1 + residual))
    assert called == [bn] and bn.num_batches_tracked == 0  # which that forward would count


# --- conversion keeps the activation ---


@pytest.mark.parametrize("options", [{}, {"affine": False, "track_running_stats": False}, {"momentum": None}])
@pytest.mark.parametrize("act", ["relu", None])
@pytest.mark.parametrize("nested", [True, False])
def test_convert_sync_batchnorm_keeps_the_activation(options, act, nested):
    bn = BatchNormAct2d(4, act=act, **options)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), bn) if nested else bn
    x = torch.randn(2, 3 if nested else 4, 5, 5)
    expected = copy.deepcopy(model)(x)
    for _ in range(2):  # the second time it is a SyncBatchNorm that is converted
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        made = model[1] if nested else model
        assert type(made) is SyncBatchNormAct2d and made.act == act
    assert isinstance(made, nn.SyncBatchNorm) and made.weight is bn.weight and made.running_mean is bn.running_mean
    assert made.momentum == bn.momentum
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)  # one process: the plain path


def test_timms_converter_keeps_it_too():
    layers = pytest.importorskip("timm.layers")
    model = layers.convert_sync_batchnorm(nn.Sequential(BatchNormAct2d(4)))
    assert type(model[0]) is SyncBatchNormAct2d and model[0].act == "relu"


def test_a_converter_that_would_lose_the_activation_is_refused():
    class Other(nn.BatchNorm2d):
        pass

    def convert(module):
        module_output = Other(module.num_features) if isinstance(module, nn.BatchNorm2d) else module
        for name, child in module.named_children():
            module_output.add_module(name, convert(child))
        return module_output

    with pytest.raises(
        TypeError, match="Other cannot replace a BatchNormAct2d, whose activation .'relu'. it would lose"
    ):
        convert(nn.Sequential(BatchNormAct2d(4)))


def test_a_converter_of_pytorchs_that_hides_what_it_makes_is_refused(monkeypatch):
    """Should a later PyTorch write it in another way, this says so, and the tests above."""

    def convert(cls, module, process_group=None):
        made = nn.SyncBatchNorm(module.num_features)
        for name, child in module.named_children():
            made.add_module(name, child)
        return made

    monkeypatch.setattr(nn.SyncBatchNorm, "convert_sync_batchnorm", classmethod(convert))
    with pytest.raises(RuntimeError, match="would lose the activation of BatchNormAct2d"):
        nn.SyncBatchNorm.convert_sync_batchnorm(BatchNormAct2d(4))


def test_children_are_listed_as_ever():
    bn = BatchNormAct2d(4)
    module_output = bn  # a converter that leaves it alone
    assert list(bn.named_children()) == [] and module_output is bn
    assert [name for name, _ in nn.Sequential(bn).named_modules()] == ["", "0"]


def test_a_batch_norm_with_a_relu_of_its_own_is_not_taken_for_a_plain_one():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4))

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = model[0], model[1]

        def forward(self, x):
            return self.bn(self.conv(x))

    x = torch.randn(2, 3, 4, 4)
    for module in (Module(), nn.SyncBatchNorm.convert_sync_batchnorm(Module())):
        fused = resnet_fused.fuse(module)
        assert (fused(x) >= 0).all() and (fused.eval()(x) >= 0).all()
        fused.train()
